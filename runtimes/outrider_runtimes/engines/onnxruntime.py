"""ONNX files by ONNX Runtime (`onnxruntime`): on the CPU, and on NVIDIA's GPUs by CUDA or TensorRT.

Each way is an engine of its own, so that which one serves is measured and not assumed. A way runs what it cannot do on
the next of its providers, and never runs at all without its first one: ONNX Runtime by itself would silently go on on
the CPU. Where a way cannot be used, its ``check`` or ``prepare`` says why, and another engine serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outrider_runtimes.engines import FileTensor
from outrider_runtimes.engines._library import Library, one_line
from outrider_runtimes.engines._protobuf import refuse_external_data
from outrider_runtimes.errors import InferenceError, ModelLoadError
from outrider_runtimes.nouns import dataclass
from outrider_runtimes.tensors import Array

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
GPU_WHEEL = "install NVIDIA's onnxruntime-gpu wheel for this JetPack in the place of onnxruntime"
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


@dataclass(frozen=True, kw_only=True)
class OnnxRuntimeEngine:
    """Runs ``.onnx`` files. Dimensions that the file leaves open may differ from call to call.

    ``providers``: ONNX Runtime's execution providers, in the order in which they are asked.
    """

    name: str = "onnxruntime"
    providers: tuple[str, ...] = (CPU,)
    formats: Sequence[str] = ("onnx",)

    @property
    def builds(self) -> bool:
        """TensorRT compiles the model for the GPU."""
        return TENSORRT in self.providers

    def check(self) -> str | None:
        """None when onnxruntime imports here and has the first provider; else the reason and the way out."""
        reason = LIBRARY.check()
        if reason is not None or self.providers == (CPU,):
            return reason
        has = LIBRARY.load().get_available_providers()
        if self.providers[0] in has:
            return None
        return f"{self.providers[0]} is not among this onnxruntime's providers ({', '.join(has)}); {GPU_WHEEL}"

    def version(self) -> str:
        """The version of onnxruntime. Raises MissingExtra."""
        return LIBRARY.version()

    def prepare(self, path: Path, *, threads: int, cache: Path | None = None) -> OnnxSession:
        """Load an ONNX file that holds all of its tensors itself.

        Raises:
            ModelLoadError: unreadable, cut short, refused by ONNX Runtime or by the first provider, with external data,
                or with inputs or outputs that are not tensors of a numpy dtype.
            MissingExtra: onnxruntime is not installed.
        """
        library = LIBRARY.load()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ModelLoadError(f"{path.name}: cannot be read: {error.strerror or error}") from error
        refuse_external_data(data, where=path.name)
        options = [provider_options(provider, cache) for provider in self.providers]
        if self.builds and cache is not None:
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            # From bytes, not by path: without a folder ONNX Runtime has nothing to resolve a reference against.
            session = library.InferenceSession(
                data, _options(library, threads), list(self.providers), options, enable_fallback=0
            )
        except Exception as error:
            raise ModelLoadError(f"{path.name}: ONNX Runtime refused it: {one_line(error)}") from error
        _require_first(self.providers, session.get_providers(), where=path.name)
        return OnnxSession(session, where=path.name)


ACCELERATED = (
    OnnxRuntimeEngine(name="onnxruntime-tensorrt", providers=(TENSORRT, CUDA, CPU)),
    OnnxRuntimeEngine(name="onnxruntime-cuda", providers=(CUDA, CPU)),
)


def has_nvidia_gpu(root: Path) -> bool:
    """Whether there is the device node of an NVIDIA GPU: of a card, or of a Jetson's own."""
    return any((root / "dev" / node).exists() for node in ("nvidia0", "nvidiactl", "nvhost-gpu", "nvgpu"))


def provider_options(provider: str, cache: Path | None) -> dict[str, str]:
    """What a provider is told. TensorRT keeps what it built and how fast the choices were that it tried."""
    if provider != TENSORRT or cache is None:
        return {}
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
    }


def _require_first(asked: Sequence[str], used: Sequence[str], *, where: str) -> None:
    if asked[0] not in used:
        raise ModelLoadError(
            f"{where}: {asked[0]} was asked for, ONNX Runtime fell back to {', '.join(used)}",
            hint="its libraries (CUDA, cuDNN, TensorRT) are missing, or of another version than this onnxruntime wants",
        )


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
        self._single = self.input_names[0] if len(self.input_names) == 1 else None
        self._session: Any = session
        # The native session under the Python one: the checks between them cost as much as a small model.
        self._run: Any = getattr(session, "_sess", session).run

    def run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        """Run once; see ``engines.Session``. Raises InferenceError."""
        if self._session is None:
            raise InferenceError("the session was closed")
        try:
            if self._single is not None and len(inputs) == 1:
                return self._run(self._names_out, {self._single: inputs[0]}, None)  # type: ignore[no-any-return]
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
