"""Quantization: a stage of the conversion. It adds variants beside the float ones; it does not change the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from outrider_exporters.passes.base import PassContext
from outrider_exporters.values import check_fields
from outrider_runtimes.errors import ConfigError

SCHEMES = ("int8",)


@dataclass(frozen=True)
class Quantize:
    """An int8 variant in every format: static, weights and activations, ranges from ``data.calibration``.

    Attributes:
        scheme: ``int8``.
    """

    scheme: str = "int8"
    kind: ClassVar[str] = "quantize"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.scheme not in SCHEMES:
            raise ConfigError(f"scheme is {self.scheme!r}, expected one of {', '.join(SCHEMES)}")

    def requires(self, context: PassContext) -> None:
        """Calibration rows."""
        if context.data.calibration is None:
            raise ConfigError("quantize needs data.calibration", hint="arrays by input name, rows like those in use")
