"""Networks into the files that engines run: ``convert.onnx``, ``convert.tflite``, ``convert.quantize``.

Importing this imports no converter; each of the three modules does.
"""

from __future__ import annotations

from outrider_exporters.convert.files import ModelFile, check_file, open_file, parity, predict_file

__all__ = ["ModelFile", "check_file", "open_file", "parity", "predict_file"]
