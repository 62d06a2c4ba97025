"""ONNX files by ONNX Runtime (`onnxruntime`), on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outrider_runtimes.engines import FileTensor
from outrider_runtimes.engines._library import Library, one_line
from outrider_runtimes.engines._protobuf import refuse_external_data
from outrider_runtimes.errors import InferenceError, ModelLoadError
from outrider_runtimes.tensors import Array

LIBRARY = Library(package="onnxruntime", module="onnxruntime", distribution="onnxruntime", extra="onnx")

DTYPE_OF_TYPE = {
    "tensor(bool)": "bool",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
}
_FATAL = 4  # errors come as exceptions; ONNX Runtime would print them as well


class OnnxRuntimeEngine:
    """Runs ``.onnx`` files. Dimensions that the file leaves open may differ from call to call."""

    name = "onnxruntime"
    formats: Sequence[str] = ("onnx",)

    def check(self) -> str | None:
        """None when onnxruntime imports here; else the reason and the way out."""
        return LIBRARY.check()

    def version(self) -> str:
        """The version of onnxruntime. Raises MissingExtra."""
        return LIBRARY.version()

    def prepare(self, path: Path, *, threads: int) -> OnnxSession:
        """Load an ONNX file that holds all of its tensors itself.

        Raises:
            ModelLoadError: unreadable, cut short, refused by ONNX Runtime, with external data, or with inputs or
                outputs that are not tensors of a numpy dtype.
            MissingExtra: onnxruntime is not installed.
        """
        library = LIBRARY.load()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ModelLoadError(f"{path.name}: cannot be read: {error.strerror or error}") from error
        refuse_external_data(data, where=path.name)
        try:
            # From bytes, not by path: without a folder ONNX Runtime has nothing to resolve a reference against.
            session = library.InferenceSession(data, _options(library, threads), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelLoadError(f"{path.name}: ONNX Runtime refused it: {one_line(error)}") from error
        return OnnxSession(session, where=path.name)


def _options(library: Any, threads: int) -> Any:
    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    # The arena keeps the largest of every shape it has met and never gives it back.
    options.enable_cpu_mem_arena = False
    # Spinning threads burn a core between calls for a p50 that is no better.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # Else bytes that look like ONNX Runtime's own format are taken as such, unseen by the walk over the protobuf.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    return options


class OnnxSession:
    """One loaded ONNX file. Not safe from several threads at once."""

    def __init__(self, session: Any, *, where: str) -> None:
        self.inputs = tuple(_file_tensor(item, where) for item in session.get_inputs())
        self.outputs = tuple(_file_tensor(item, where) for item in session.get_outputs())
        self.input_names = tuple(tensor.name for tensor in self.inputs)
        self.output_names = tuple(tensor.name for tensor in self.outputs)
        self._names_out = list(self.output_names)
        self._session: Any = session
        # The native session under the Python one: the checks between them cost as much as a small model.
        self._run: Any = getattr(session, "_sess", session).run

    def run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        """Run once; see ``engines.Session``. Raises InferenceError."""
        if self._session is None:
            raise InferenceError("the session was closed")
        try:
            return self._run(self._names_out, dict(zip(self.input_names, inputs, strict=True)), None)  # type: ignore[no-any-return]
        except Exception as error:
            raise InferenceError(f"ONNX Runtime failed: {one_line(error)}") from error

    def close(self) -> None:
        """Free it. A second call does nothing."""
        self._session = self._run = None


def _file_tensor(item: Any, where: str) -> FileTensor:
    dtype = DTYPE_OF_TYPE.get(item.type)
    if dtype is None:
        raise ModelLoadError(
            f"{where}: tensor {item.name!r} is a {item.type}, which has no numpy dtype",
            hint="cast it to a number inside the model",
        )
    shape = tuple(size if isinstance(size, int) and size >= 0 else None for size in item.shape)
    return FileTensor(name=item.name, dtype=dtype, shape=shape)
