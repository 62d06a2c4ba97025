"""Bundles as a service: the Open Inference Protocol v2 over HTTP. Needs the extra ``[serve]``."""

from outrider.endpoint.serve import serve

__all__ = ["serve"]
