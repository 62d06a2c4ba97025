"""Bundles as a service: the Open Inference Protocol v2 over HTTP. Needs the extra ``[serve]``."""

from outrider.endpoint.listening import Listening, ServerTls
from outrider.endpoint.serve import serve

__all__ = ["Listening", "ServerTls", "serve"]
