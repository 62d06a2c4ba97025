"""What the files are called, and how the peers' are made."""

from __future__ import annotations

from dataclasses import dataclass

OURS = "ours: "  # before the name of a variant in the bundle
GIVEN_FLOAT = ", given float32"  # behind the name of a file that takes int8: what makes int8 of float32 is timed too
UNPRUNED, PRUNED = "unpruned", "pruned"
ORT_DEFAULT, AEQ_DEFAULT = "ORT QDQ S8S8", "LiteRT int8 by AI Edge Quantizer"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A file that the tools make by themselves, and how."""

    is_float: bool
    recipe: str


PEERS = {
    "ORT fp32": Peer(is_float=True, recipe="torch.onnx.export(dynamo=True)"),
    ORT_DEFAULT: Peer(
        is_float=False, recipe="quant_pre_process, quantize_static: its defaults (int8, per tensor, min-max)"
    ),
    "ORT QDQ U8S8 per channel": Peer(
        is_float=False, recipe="quant_pre_process, quantize_static(activation_type=QUInt8, per_channel=True)"
    ),
    "ORT QOperator U8S8": Peer(
        is_float=False, recipe="quant_pre_process, quantize_static(quant_format=QOperator, activation_type=QUInt8)"
    ),
    "LiteRT fp32": Peer(is_float=True, recipe="litert_torch.convert with channel-last input"),
    AEQ_DEFAULT: Peer(is_float=False, recipe="recipe.static_wi8_ai8, calibrated by Quantizer.calibrate"),
}
