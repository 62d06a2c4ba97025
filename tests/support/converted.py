"""Networks converted once for all tests of a session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from outrider_exporters.convert import ModelFile
from outrider_exporters.convert.onnx import to_onnx
from outrider_exporters.convert.tflite import to_tflite
from outrider_exporters.sources.module import interface_from_module
from outrider_runtimes.tensors import Interface

CONVERTERS = {"onnx": to_onnx, "tflite": to_tflite}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A network, its interface, and its float32 files by format."""

    network: nn.Module
    interface: Interface
    example: Mapping[str, np.ndarray]
    files: Mapping[str, ModelFile]


def convert(network: nn.Module, example: Mapping[str, np.ndarray], outputs: list[str], folder: Path) -> Converted:
    interface = interface_from_module(network, example, outputs)
    files = {f: to(network, interface, example, folder / f"model.{f}") for f, to in CONVERTERS.items()}
    return Converted(network=network, interface=interface, example=example, files=files)
