"""ONNX files by ONNX Runtime (`onnxruntime`): on the CPU, and on NVIDIA's GPUs by CUDA or TensorRT.

Each way is an engine of its own, so that which one serves is measured and not assumed. A way runs what it cannot do on
the next of its providers, and never runs at all without its first one: ONNX Runtime by itself would silently go on on
the CPU. Where a way cannot be used, its ``check`` or ``prepare`` says why, and another engine serves. A wheel with a
provider inside says nothing of whether it starts: that is tried.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outrider_runtimes.engines import FileTensor
from outrider_runtimes.engines._library import Library, one_line
from outrider_runtimes.engines._protobuf import refuse_external_data
from outrider_runtimes.errors import InferenceError, ModelLoadError, NoEngine
from outrider_runtimes.nouns import dataclass
from outrider_runtimes.tensors import Array

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
GPU_WHEEL = "install NVIDIA's onnxruntime-gpu wheel for this JetPack in the place of onnxruntime"
CPU_WHEEL = "there is no NVIDIA GPU here: install onnxruntime in the place of onnxruntime-gpu"
GPU_LIBRARIES = "its libraries (CUDA, cuDNN, TensorRT) are missing, or of another version than this onnxruntime wants"
_LIBRARY_OF = {CUDA: "libonnxruntime_providers_cuda.so", TENSORRT: "libonnxruntime_providers_tensorrt.so"}
# An ONNX file whose input `x`, a float32 [1], is its output: a session of it starts a provider and compiles nothing.
_PASS_THROUGH = bytes.fromhex(
    "08083a25120167"  # IR version 8, a graph of the name g
    "5a0f0a0178120a0a08080112040a020801"  # its input
    "620f0a0178120a0a08080112040a020801"  # its output
    "4202100d"  # the operators of version 13
)
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

    ``providers``: ONNX Runtime's execution providers, in the order in which they are asked. ``device``: False where
    there is no GPU for them, and the engine is listed for the sake of the reason that ``check`` gives.
    """

    name: str = "onnxruntime"
    providers: tuple[str, ...] = (CPU,)
    formats: Sequence[str] = ("onnx",)
    device: bool = True

    @property
    def builds(self) -> bool:
        """TensorRT compiles the model for the GPU."""
        return TENSORRT in self.providers and self.device

    def check(self) -> str | None:
        """None when onnxruntime imports here and the first provider starts; else the reason and the way out."""
        reason = LIBRARY.check()
        if reason is not None or self.providers == (CPU,):
            return reason
        refusal = self._refusal(LIBRARY.load())
        return None if refusal is None else f"{refusal}; {refusal.hint}"

    def version(self) -> str:
        """The version of onnxruntime. Raises MissingExtra."""
        return LIBRARY.version()

    def prepare(self, path: Path, *, threads: int, cache: Path | None = None) -> OnnxSession:
        """Load an ONNX file that holds all of its tensors itself.

        Raises:
            ModelLoadError: unreadable, cut short, refused by ONNX Runtime, with external data, or with inputs or
                outputs that are not tensors of a numpy dtype.
            NoEngine: the first provider does not start here.
            MissingExtra: onnxruntime is not installed.
        """
        library = LIBRARY.load()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ModelLoadError(f"{path.name}: cannot be read: {error.strerror or error}") from error
        refuse_external_data(data, where=path.name)
        if self.builds and cache is not None:
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        refusal = None
        try:
            session = self._session(library, data, threads, cache)
        except Exception as error:
            refusal = self._refusal(library)
            if refusal is None:
                what = one_line(_without_source(error))
                raise ModelLoadError(f"{path.name}: ONNX Runtime refused it: {what}") from error
        else:
            if self.providers[0] not in session.get_providers():
                refusal = self._refusal(library) or _refusal(self.providers[0], "ONNX Runtime went on without it")
        if refusal is not None:
            raise refusal
        return OnnxSession(session, where=path.name)

    def _session(self, library: Any, data: bytes, threads: int, cache: Path | None) -> Any:
        options = [provider_options(provider, cache) for provider in self.providers]
        # From bytes, not by path: without a folder ONNX Runtime has nothing to resolve a reference against.
        return library.InferenceSession(
            data, _options(library, threads), list(self.providers), options, enable_fallback=0
        )

    def _refusal(self, library: Any) -> NoEngine | None:
        """Why the first provider does not start here; None where it does."""
        first = self.providers[0]
        if first == CPU:
            return None
        has = library.get_available_providers()
        if first not in has:
            what = f"{first} is not among this onnxruntime's providers ({', '.join(has)})"
            return NoEngine(what, hint=GPU_WHEEL)
        try:
            started = self._session(library, _PASS_THROUGH, 1, None).get_providers()
            why = "ONNX Runtime went on without it"
        except Exception as error:
            started, why = [], one_line(_without_source(error))
        return None if first in started else _refusal(first, _missing_library(first) or why)


ACCELERATED = (
    OnnxRuntimeEngine(name="onnxruntime-tensorrt", providers=(TENSORRT, CUDA, CPU)),
    OnnxRuntimeEngine(name="onnxruntime-cuda", providers=(CUDA, CPU)),
)


def accelerated(root: Path) -> tuple[OnnxRuntimeEngine, ...]:
    """The ways onto a GPU that are of interest: there is one, or the onnxruntime that is installed is made for one."""
    if has_nvidia_gpu(root):
        return ACCELERATED
    return tuple(dataclasses.replace(way, device=False) for way in ACCELERATED) if has_gpu_library() else ()


def has_nvidia_gpu(root: Path) -> bool:
    """Whether there is the device node of an NVIDIA GPU: of a card, or of a Jetson's own."""
    return any((root / "dev" / node).exists() for node in ("nvidia0", "nvidiactl", "nvhost-gpu", "nvgpu"))


def _without_source(error: Exception) -> Exception:
    """What it says without where in the library that was: a signature alone may be longer than a line."""
    return ValueError(re.sub(r"/\S+\.(?:cc|h):\d+ [^()]*\([^()]*\) ", "", str(error)))


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


def _refusal(provider: str, why: str) -> NoEngine:
    cure = GPU_LIBRARIES if has_nvidia_gpu(Path("/")) else CPU_WHEEL
    return NoEngine(f"{provider} does not start here: {why}", hint=cure)


def _missing_library(provider: str) -> str | None:
    """What the dynamic linker says of a provider: ONNX Runtime prints it, and raises it not at all or as another text.

    Only after ONNX Runtime has tried to load it: before, the provider's library runs into a host that is not there.
    """
    import ctypes  # here alone: nearly every start does without

    for folder in _native_folders():
        try:
            ctypes.CDLL(str(folder / _LIBRARY_OF[provider]))
        except OSError as error:
            return re.sub(r"/\S*/", "", one_line(error))
    return None


def has_gpu_library() -> bool:
    """Whether the onnxruntime that is installed has a provider for NVIDIA's GPUs. Imports nothing."""
    return any((folder / name).exists() for folder in _native_folders() for name in _LIBRARY_OF.values())


def _native_folders() -> list[Path]:
    try:
        found = importlib.util.find_spec(LIBRARY.package)
    except (ImportError, ValueError):
        return []
    places = found.submodule_search_locations if found is not None else None
    return [Path(place) / "capi" for place in places or ()]


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
