"""What a device does with a model: install a bundle, run it, report, and ask the cloud where the board cannot answer.

Importing this loads numpy and the standard library alone; what is behind a public name is imported at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from outrider_runtimes.errors import (
    AdmissionAnswer,
    AdmissionCrash,
    AdmissionError,
    AdmissionHang,
    AdmissionIllegal,
    AdmissionLimit,
    AdmissionNaN,
    AdmissionSlow,
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
    ShapeError,
    StateDirectoryError,
    StoreError,
    TelemetryError,
    TrustError,
    UnknownTensor,
    UnsupportedBundle,
)
from outrider_runtimes.tensors import Interface, TensorSpec

if TYPE_CHECKING:
    from outrider.bundle import Trust
    from outrider.hybrid import Hybrid
    from outrider.installer import InstallReport, install, rollback
    from outrider.model import Model, load
    from outrider.opening import BundleInfo
    from outrider.policy import Policy
    from outrider.prediction import Prediction
    from outrider.serving import Change
    from outrider.supervise import Limits
    from outrider.telemetry import Reporter
    from outrider_runtimes.deadline import Deadline
    from outrider_runtimes.remote import Remote

__version__ = "0.1.0"

_HOMES = {
    "BundleInfo": "outrider.opening",
    "Change": "outrider.serving",
    "Deadline": "outrider_runtimes.deadline",
    "Hybrid": "outrider.hybrid",
    "InstallReport": "outrider.installer",
    "Limits": "outrider.supervise",
    "Model": "outrider.model",
    "Policy": "outrider.policy",
    "Prediction": "outrider.prediction",
    "Remote": "outrider_runtimes.remote",
    "Reporter": "outrider.telemetry",
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
    "BundleError",
    "BundleInfo",
    "Change",
    "ConfigError",
    "Deadline",
    "DeadlineExceeded",
    "DtypeError",
    "EngineError",
    "FormatError",
    "Hybrid",
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
    "ShapeError",
    "StateDirectoryError",
    "StoreError",
    "TelemetryError",
    "TensorSpec",
    "Trust",
    "TrustError",
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
