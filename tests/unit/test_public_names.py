"""What `import outrider` gives, and what it costs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from importlib.metadata import version

import pytest

import outrider
from outrider_runtimes import errors

PUBLIC = [
    "AdmissionAnswer",
    "AdmissionCrash",
    "AdmissionError",
    "AdmissionHang",
    "AdmissionIllegal",
    "AdmissionLimit",
    "AdmissionNaN",
    "AdmissionSlow",
    "AgentError",
    "Budget",
    "BundleError",
    "BundleInfo",
    "Change",
    "ConfigError",
    "Deadline",
    "DeadlineExceeded",
    "DtypeError",
    "EngineError",
    "Failure",
    "FormatError",
    "Hybrid",
    "HybridEvent",
    "InferenceError",
    "InputError",
    "InstallReport",
    "IntegrityError",
    "Interface",
    "InterfaceMismatch",
    "Limits",
    "MissingExtra",
    "Model",
    "ModelLoadError",
    "NoEngine",
    "NotFiniteError",
    "NotInstalled",
    "OutriderError",
    "Policy",
    "Prediction",
    "QueueFull",
    "Remote",
    "RemoteRefused",
    "RemoteUnavailable",
    "ReplyError",
    "Reporter",
    "RolledBack",
    "RunnerClosed",
    "RunnerError",
    "RunnerStuck",
    "ShapeError",
    "SourceError",
    "StateDirectoryError",
    "StoreError",
    "TelemetryError",
    "TensorSpec",
    "Tls",
    "Trust",
    "TrustError",
    "UnknownModel",
    "UnknownTensor",
    "UnsupportedBundle",
    "install",
    "load",
    "rollback",
]
# Errors of the workstation's commands: no call of the device's surface raises them.
WORKSTATION_ERRORS = {"ExportError", "GateMissed", "RehearsalError"}

FORBIDDEN = [
    *("torch", "onnx", "rich", "onnxruntime", "ai_edge_litert", "tflite_runtime", "paho", "cryptography", "starlette"),
    *("uvicorn", "httptools", "sklearn", "outrider_exporters", "http.client", "ssl", "sqlite3", "asyncio"),
]


def fresh(code: str) -> list[str]:
    """Names in sys.modules after `code` in a new process, without those that were there before it."""
    script = "\n".join(
        [
            "import json, sys",
            "before = set(sys.modules)",
            code,
            "print(json.dumps(sorted(set(sys.modules) - before)))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=250)
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names


def packages(modules: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_the_public_names_are_pinned() -> None:
    assert outrider.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(outrider))


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_is_a_class_or_a_function_with_a_docstring(name: str) -> None:
    value = getattr(outrider, name)
    assert not isinstance(value, types.ModuleType)
    assert callable(value) and value.__doc__


def test_every_error_is_public_and_the_same_object() -> None:
    tree = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.OutriderError)
    }
    assert tree - WORKSTATION_ERRORS <= set(PUBLIC)
    for name in tree & set(PUBLIC):
        assert getattr(outrider, name) is getattr(errors, name)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="lod"):
        _ = outrider.lod  # type: ignore[attr-defined]


def test_no_submodule_takes_a_public_name_from_the_package() -> None:
    for name in PUBLIC:
        getattr(outrider, name)
    for module in ("admit", "bundle", "hybrid", "installer", "model", "policy", "prediction", "store"):
        importlib.import_module(f"outrider.{module}")
        assert module not in PUBLIC


def test_the_version_is_the_distributions() -> None:
    assert outrider.__version__ == version("outrider")


def test_the_command_says_the_version_of_its_home() -> None:
    program = (
        "from outrider import _version; _version.__version__ = '9.8.7'; "
        "from outrider.cli.commands import build_parser; build_parser().parse_args(['--version'])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert said.stdout == "outrider 9.8.7\n"


def test_importing_outrider_loads_the_standard_library_alone() -> None:
    modules = fresh("import outrider")
    assert packages(modules) - {"outrider", "outrider_runtimes"} <= set(sys.stdlib_module_names)
    assert [name for name in FORBIDDEN if name in modules] == []
    with_outrider = {name for name in modules if name.startswith("outrider")}
    assert with_outrider == {"outrider", "outrider._version", "outrider_runtimes", "outrider_runtimes.errors"}


def test_a_tensor_adds_little_to_numpy() -> None:
    modules = fresh("from outrider import Interface, TensorSpec")
    assert packages(modules) - {"outrider", "outrider_runtimes", "numpy"} <= set(sys.stdlib_module_names)
    with_outrider = {name for name in modules if name.startswith("outrider")}
    below = {f"outrider_runtimes.{name}" for name in ("_inputs", "errors", "nouns", "tensors")}
    assert with_outrider == {"outrider", "outrider._version", "outrider_runtimes", *below}


def test_what_only_an_install_needs_is_not_loaded_with_load() -> None:
    """A board's service starts by ``load``; each of these is some milliseconds of its start."""
    modules = fresh("import outrider; outrider.load")
    heavy = {"subprocess", "tempfile", "shutil", "random", "importlib.metadata", "email"}
    heavy |= {"base64", "concurrent.futures", "hashlib", "logging", "queue", "sysconfig", "fcntl"}
    admit = ("admit.admit", "admit.supervise", "admit.trial")
    install = (*admit, "installer", "probation", "bundle.reader", "bundle.writer")
    later = ("bundle.format", "bundle.golden", "bundle.offload", "ladder", "serving", "store.marks", "stream")
    ours = {f"outrider.{name}" for name in (*install, *later)} | {
        "outrider_runtimes.golden",
        "outrider_runtimes.worker",
    }
    assert (heavy | ours) & set(modules) == set()


def test_an_engine_by_its_name_brings_no_other() -> None:
    program = "from outrider_runtimes.engines import engine_named; engine_named({!r})"
    for name, other in (("onnxruntime", "_interpreter"), ("litert", "onnxruntime")):
        modules = fresh(program.format(name))
        assert f"outrider_runtimes.engines.{name}" in modules
        assert f"outrider_runtimes.engines.{other}" not in modules


SLOW = pytest.mark.slow  # a Python each: the loop has the two that bring the most


@pytest.mark.parametrize(
    "name",
    ["load", "Hybrid", *(pytest.param(name, marks=SLOW) for name in ("install", "Model", "Prediction", "Policy"))],
)
def test_a_public_name_alone_needs_no_engine_and_no_client(name: str) -> None:
    modules = fresh(f"import outrider; outrider.{name}")
    assert packages(modules) - {"outrider", "outrider_runtimes", "numpy"} <= set(sys.stdlib_module_names)
