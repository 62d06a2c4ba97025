"""What a device does with a model: install a bundle, run it, report, and ask the cloud where the board cannot answer.

Importing this loads the errors and the standard library alone; what is behind any other public name, numpy with it, is
imported at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from outrider._version import __version__ as __version__
from outrider_runtimes.errors import (
    AdmissionAnswer,
    AdmissionCrash,
    AdmissionError,
    AdmissionHang,
    AdmissionIllegal,
    AdmissionLimit,
    AdmissionNaN,
    AdmissionSlow,
    AgentError,
    BundleError,
    ConfigError,
    DeadlineExceeded,
    DtypeError,
    EngineError,
    FormatError,
    InferenceError,
    InputError,
    IntegrityError,
    InterfaceMismatch,
    MissingExtra,
    ModelLoadError,
    NoEngine,
    NotFiniteError,
    NotInstalled,
    OutriderError,
    QueueFull,
    RemoteRefused,
    RemoteUnavailable,
    ReplyError,
    RolledBack,
    RunnerClosed,
    RunnerError,
    RunnerStuck,
    ShapeError,
    SourceError,
    StateDirectoryError,
    StoreError,
    TelemetryError,
    TrustError,
    UnknownModel,
    UnknownTensor,
    UnsupportedBundle,
)

if TYPE_CHECKING:
    from outrider.admit.supervise import Limits
    from outrider.bundle import Trust
    from outrider.events import HybridEvent
    from outrider.hybrid import Hybrid
    from outrider.installer import InstallReport, install, rollback
    from outrider.model import Model, load
    from outrider.opening import BundleInfo
    from outrider.policy import Budget, Policy
    from outrider.prediction import Failure, Prediction
    from outrider.serving import Change
    from outrider.telemetry import Reporter
    from outrider_runtimes.deadline import Deadline
    from outrider_runtimes.remote import Remote
    from outrider_runtimes.tensors import Interface, TensorSpec
    from outrider_runtimes.tls import Tls


_HOMES = {
    "Budget": "outrider.policy",
    "BundleInfo": "outrider.opening",
    "Change": "outrider.serving",
    "Deadline": "outrider_runtimes.deadline",
    "Failure": "outrider.prediction",
    "Hybrid": "outrider.hybrid",
    "HybridEvent": "outrider.events",
    "InstallReport": "outrider.installer",
    "Interface": "outrider_runtimes.tensors",
    "Limits": "outrider.admit.supervise",
    "Model": "outrider.model",
    "Policy": "outrider.policy",
    "Prediction": "outrider.prediction",
    "Remote": "outrider_runtimes.remote",
    "Reporter": "outrider.telemetry",
    "TensorSpec": "outrider_runtimes.tensors",
    "Tls": "outrider_runtimes.tls",
    "Trust": "outrider.bundle",
    "install": "outrider.installer",
    "load": "outrider.model",
    "rollback": "outrider.installer",
}

__all__ = [
    "AdmissionAnswer",
    "AdmissionCrash",
    "AdmissionError",
    "AdmissionHang",
    "AdmissionIllegal",
    "AdmissionLimit",
    "AdmissionNaN",
    "AdmissionSlow",
    "AgentError",
    "Budget",
    "BundleError",
    "BundleInfo",
    "Change",
    "ConfigError",
    "Deadline",
    "DeadlineExceeded",
    "DtypeError",
    "EngineError",
    "Failure",
    "FormatError",
    "Hybrid",
    "HybridEvent",
    "InferenceError",
    "InputError",
    "InstallReport",
    "IntegrityError",
    "Interface",
    "InterfaceMismatch",
    "Limits",
    "MissingExtra",
    "Model",
    "ModelLoadError",
    "NoEngine",
    "NotFiniteError",
    "NotInstalled",
    "OutriderError",
    "Policy",
    "Prediction",
    "QueueFull",
    "Remote",
    "RemoteRefused",
    "RemoteUnavailable",
    "ReplyError",
    "Reporter",
    "RolledBack",
    "RunnerClosed",
    "RunnerError",
    "RunnerStuck",
    "ShapeError",
    "SourceError",
    "StateDirectoryError",
    "StoreError",
    "TelemetryError",
    "TensorSpec",
    "Tls",
    "Trust",
    "TrustError",
    "UnknownModel",
    "UnknownTensor",
    "UnsupportedBundle",
    "install",
    "load",
    "rollback",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'outrider' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
