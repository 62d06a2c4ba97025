"""From a trained network to a bundle, on a workstation.

Importing this imports nothing else: the public names come in when they are first asked for, torch and the converters
where they are used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outrider_exporters.data import Data
    from outrider_exporters.export import export
    from outrider_exporters.gates import GateResult, MaxDrop, MaxLatency, MaxMetric, MaxParityError, MaxSize, MinMetric
    from outrider_exporters.offload import Offload
    from outrider_exporters.package import PackageReport, package
    from outrider_exporters.passes import QAT, Distill, Progress, Prune, Quantize, Stage
    from outrider_exporters.recipe import Recipe
    from outrider_exporters.report import ExportReport, VariantReport
    from outrider_exporters.sources.checkpoints import load_checkpoint
    from outrider_exporters.values import Metric

__all__ = [
    "QAT",
    "Data",
    "Distill",
    "ExportReport",
    "GateResult",
    "MaxDrop",
    "MaxLatency",
    "MaxMetric",
    "MaxParityError",
    "MaxSize",
    "Metric",
    "MinMetric",
    "Offload",
    "PackageReport",
    "Progress",
    "Prune",
    "Quantize",
    "Recipe",
    "Stage",
    "VariantReport",
    "export",
    "load_checkpoint",
    "package",
]

_HOMES = {
    "sources.checkpoints": ("load_checkpoint",),
    "data": ("Data",),
    "export": ("export",),
    "gates": ("GateResult", "MaxDrop", "MaxLatency", "MaxMetric", "MaxParityError", "MaxSize", "MinMetric"),
    "offload": ("Offload",),
    "package": ("PackageReport", "package"),
    "passes": ("QAT", "Distill", "Progress", "Prune", "Quantize", "Stage"),
    "recipe": ("Recipe",),
    "report": ("ExportReport", "VariantReport"),
    "values": ("Metric",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """``export`` and ``package`` are modules and, here, the functions in them. The import system binds a module to its
    package when it is first imported, by whomever; this keeps the function in that place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME_OF.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
