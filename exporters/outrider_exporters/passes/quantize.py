"""Quantization: a stage of the conversion. It adds variants beside the float ones; it does not change the network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from outrider_exporters.convert.observers import OBSERVERS
from outrider_exporters.passes.base import PassContext
from outrider_exporters.values import check_fields
from outrider_runtimes.errors import ConfigError

SCHEMES = ("int8", "dynamic", "weight-only", "float16", "int4")
ACTIVATIONS = ("int8", "uint8")
_KNOWN = {
    "scheme": SCHEMES,
    "activations": ACTIVATIONS,
    "operators": ("qdq", "qoperator"),
    "io": ("int8", "float"),
    "observer": OBSERVERS,
}


@dataclass(frozen=True)
class Quantize:
    """A smaller variant in every format, called after its scheme: ``onnx-int8``, ``tflite-weight-only``.

    Attributes:
        scheme: what is stored and computed in fewer bits.
            ``int8``: weights and activations; ranges from ``data.calibration``.
            ``dynamic``: int8 weights, activations quantized as they come; for attention and dense layers, and in
            TFLite for recurrent ones. ONNX leaves convolutions in float: they would be several times slower.
            ``weight-only``: int8 weights of every operator that has any, recurrent ones too; computed in float.
            ``float16``: weights of half the size; computed in float.
            ``int4``: 4-bit weights of dense layers and products; for networks that are mostly these.
        per_channel: a scale a channel of a weight; else one a weight. Of ``int8``, ``dynamic`` and ``weight-only``.
        activations: ``int8`` or ``uint8``, of ``int8`` in ONNX; TFLite has ``int8`` only.
        operators: ``qdq`` (float operators between pairs that quantize, which the engine fuses) or ``qoperator``
            (integer operators in the file), of ``int8`` in ONNX.
        io: ``int8`` or ``float``, what ``int8`` in TFLite takes and gives; ONNX is float always.
        observer: how ``int8`` finds the range of an activation: ``min-max``, ``percentile`` or ``mse``.
        keep_float: what stays as it is, by the layer's path in the torch network (``blocks.0``: all below it, with
            the operators without weights that follow) or by the operator's name in one format's float file
            (``onnx:node_conv2d``, ``tflite:...``).
    """

    scheme: str = "int8"
    per_channel: bool = field(default=True, kw_only=True)
    activations: str = field(default="int8", kw_only=True)
    operators: str = field(default="qdq", kw_only=True)
    io: str = field(default="int8", kw_only=True)
    observer: str = field(default="min-max", kw_only=True)
    keep_float: tuple[str, ...] = field(default=(), kw_only=True)
    kind: ClassVar[str] = "quantize"

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "keep_float", tuple(self.keep_float))
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if "" in self.keep_float:
            raise ConfigError("keep_float has an empty name")
        self._check_used()

    def _check_used(self) -> None:
        """An option that a scheme does not have is refused, not ignored."""
        static, grained = self.scheme == "int8", self.scheme in ("int8", "dynamic", "weight-only")
        given = (self.activations, self.operators, self.io, self.observer)
        if not static and given != ("int8", "qdq", "int8", "min-max"):
            raise ConfigError(f"activations, operators, io and observer are of scheme 'int8', not of {self.scheme!r}")
        if not grained and not self.per_channel:
            raise ConfigError(f"per_channel is of integer weights in 8 bits, not of scheme {self.scheme!r}")

    def requires(self, context: PassContext) -> None:
        """Calibration rows, where ranges are found ahead."""
        if self.scheme == "int8" and context.data.calibration is None:
            raise ConfigError("quantize needs data.calibration", hint="arrays by input name, rows like those in use")
