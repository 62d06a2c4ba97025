"""What cannot work, in one list: which network, in which format and precision, why, and the nearest that does.

Errors take their hint from here, and the tests show of each entry that it still fails and that the other way works; an
entry whose cause is gone leaves the list.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

ONNX, TFLITE = ("onnx",), ("tflite",)
BOTH = ("onnx", "tflite")
ANY_PRECISION = ("float32", "int8", "dynamic", "weight-only", "float16", "int4")
# Not an operator: torch.export met a condition or a size that depends on a tensor's values.
DATA_DEPENDENT = "data-dependent"
SEVERAL_SIGNATURES = "several-signatures"  # nor this: a file for several shapes


@dataclass(frozen=True, kw_only=True)
class KnownGap:
    """One combination that cannot work.

    Attributes:
        network: its kind, in words.
        formats, precisions: where it fails; precisions as ``Quantize`` and the variants call them.
        operators: as torch (without ``aten.``), ONNX or TFLite name them; one of them is in the error or the file.
        layers: torch classes, one of which the network must have; none: any network.
        reason: what stands in the way, in one line.
        instead: the nearest recipe, or change of the network, that works.
    """

    network: str
    formats: tuple[str, ...]
    precisions: tuple[str, ...] = ANY_PRECISION
    operators: tuple[str, ...]
    layers: tuple[str, ...] = ()
    reason: str
    instead: str


KNOWN_GAPS = (
    KnownGap(
        network="nn.Transformer with a mask of its own",
        formats=BOTH,
        operators=(DATA_DEPENDENT, "_transformer_encoder_layer_fwd"),
        layers=("Transformer", "TransformerEncoder", "TransformerDecoder"),
        reason="given a mask, the layer looks at its values to find out whether it is causal",
        instead="call it with tgt_is_causal=True (is_causal=True) beside the mask",
    ),
    KnownGap(
        network="a condition or a loop on a tensor's values",
        formats=ONNX,
        operators=(DATA_DEPENDENT,),
        reason="an ONNX file has one graph, which is traced without values",
        instead="compute both ways and choose with torch.where, or give a loop a fixed number of steps",
    ),
    KnownGap(
        network="a condition, a loop or a size that depends on a tensor's values",
        formats=TFLITE,
        operators=(DATA_DEPENDENT, "nonzero", "_unique2", "unique_dim"),
        reason="a TFLite file has one graph with fixed sizes, which is traced without values",
        instead='torch.where for conditions; for sizes formats=("onnx",) leaves TFLite out',
    ),
    KnownGap(
        network="sorting and top-k",
        formats=TFLITE,
        operators=("STABLEHLO_SORT",),
        reason="litert-torch writes an operator that LiteRT does not have",
        instead='sort after the network (argmax and max work), or formats=("onnx",)',
    ),
    KnownGap(
        network="distances by torch.cdist",
        formats=ONNX,
        operators=("_cdist_forward",),
        reason="torch's ONNX exporter has no form of it",
        instead="((a[:, :, None] - b[:, None]) ** 2).sum(-1).sqrt() is the same and works in both formats",
    ),
    KnownGap(
        network="determinants",
        formats=TFLITE,
        operators=("_linalg_det",),
        reason="TFLite has no determinant",
        instead='formats=("onnx",)',
    ),
    KnownGap(
        network="matrix decompositions and inverses",
        formats=BOTH,
        operators=("_linalg_svd", "linalg_inv_ex", "_linalg_eigh", "linalg_qr", "linalg_cholesky_ex"),
        reason="neither format has them",
        instead="compute those of weights once and keep them as buffers; leave the others to the caller",
    ),
    KnownGap(
        network="special functions",
        formats=BOTH,
        operators=("lgamma", "erfinv", "erf_inv", "i0", "bessel_i0", "digamma"),
        reason="neither format has them",
        instead="a polynomial over the range that occurs, or a table with torch.nn.functional.embedding",
    ),
    KnownGap(
        network="several shapes in one file",
        formats=TFLITE,
        precisions=("int8",),
        operators=(SEVERAL_SIGNATURES,),
        reason="calibration rows have one size, so that the other signatures have no ranges",
        instead='Quantize("dynamic") needs no ranges; or one size in shapes',
    ),
    KnownGap(
        network="recurrent",
        formats=ONNX,
        precisions=("int8", "dynamic"),
        operators=("GRU", "RNN"),
        reason="ONNX Runtime computes recurrent layers in float",
        instead='Quantize("weight-only") stores their weights in 8 bits',
    ),
    KnownGap(
        network="generators of transposed convolutions",
        formats=ONNX,
        precisions=("dynamic",),
        operators=("ConvTranspose",),
        reason="ONNX Runtime has no integer form of a transposed convolution",
        instead='Quantize("weight-only") stores their weights in 8 bits',
    ),
)


def find_gap(
    model_format: str, precision: str, *, operators: Set[str], layers: Set[str] = frozenset()
) -> KnownGap | None:
    """The first entry that covers a failure, the more special ones first.

    Args:
        operators: what the error names, or what the file has; ``aten.`` and an overload (``.default``) may be there.
        layers: names of the torch classes in the network.
    """
    bare = {bare_name(operator) for operator in operators}
    for gap in KNOWN_GAPS:
        covered = model_format in gap.formats and precision in gap.precisions
        if covered and bare & set(gap.operators) and (not gap.layers or layers & set(gap.layers)):
            return gap
    return None


def bare_name(operator: str) -> str:
    """``aten._linalg_svd.default`` and ``prims.lgamma`` as ``_linalg_svd`` and ``lgamma``."""
    parts = operator.replace("::", ".").removeprefix("torch.ops.").split(".")
    return parts[1] if len(parts) > 1 and parts[0] in ("aten", "prims", "onnx") else parts[0]
