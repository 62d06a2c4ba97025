"""What an export is asked to do, and what of it is refused at once."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outrider.bundle.manifest import FORMATS, NAME
from outrider_exporters.around import Caller
from outrider_exporters.choose import formats_of, resolved, speaks_for
from outrider_exporters.data import Data, check_rows
from outrider_exporters.gates import Gate, MaxLatency
from outrider_exporters.measure import Evaluate
from outrider_exporters.offload import Offload, Wrong, check_offload
from outrider_exporters.passes import PassContext
from outrider_exporters.recipe import Recipe
from outrider_runtimes.board import Board
from outrider_runtimes.errors import ConfigError, MissingExtra
from outrider_runtimes.targets import target_named
from outrider_runtimes.tensors import Interface, Tensors

TOOLS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "tflite": ("litert_torch", "ai_edge_litert")}
QUANTIZERS = {"onnx": ("onnxruntime",), "tflite": ("ai_edge_quantizer",)}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What was asked for, checked; the arguments of ``export``, and the host that it runs on.

    Attributes:
        data: as it was given, at the caller's side; ``context.data`` is at the network's.
        evaluate: of a function at the network's side; it puts the steps around it.
        caller: the side of the bundle's users.
        golden: at the caller's side.
        tensors: free axes, their sizes in TFLite and the state, as they were asked for, by argument.
    """

    name: str
    version: int
    output: Path
    recipe: Recipe
    formats: tuple[str, ...]
    targets: tuple[str, ...]
    gates: tuple[Gate, ...]
    signing_keys: tuple[Any, ...]
    data: Data
    evaluate: Evaluate
    caller: Caller
    context: PassContext
    host: Board
    golden: Tensors | None = None
    offload: Offload | None = None
    is_wrong: Wrong | None = None
    cloud_only: bool = False
    report: Path | None = None
    tensors: Mapping[str, Any] = field(default_factory=dict)

    @property
    def interface(self) -> Interface:
        """The network's; that of the bundle is the caller's."""
        return self.context.interface


def bundle_name(name: str | None, output: Path) -> str:
    """The name that was given, else the output file's. Raises ConfigError."""
    given = output.stem if name is None else name
    if not NAME.match(given):
        raise ConfigError(
            f"the bundle's name is {given!r}, expected lower-case letters, digits, '.', '_', '-', at most 64",
            hint='export(..., name="digits")',
        )
    return given


def check_job(job: Job) -> None:
    """Everything that can be refused before the work begins. Raises ConfigError or MissingExtra."""
    if isinstance(job.version, bool) or not isinstance(job.version, int) or job.version < 1:
        raise ConfigError(f"version is {job.version!r}, expected an integer of 1 or more")
    seed = job.context.seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed!r}, expected an integer of 0 or more, below 2**63")
    unknown = [item for item in job.formats if item not in FORMATS]
    if unknown or not job.formats or len(set(job.formats)) != len(job.formats):
        raise ConfigError(f"formats is {job.formats}, expected one or both of {', '.join(FORMATS)}")
    _check_writable(job.output, "output")
    if job.report is not None:
        _check_report(job.report)
    _check_tools(job)
    check_targets(job.targets, job.formats)
    check_latency_gates(job.gates, job.targets, job.host)
    _check_labels(job.interface)
    for position, key in enumerate(job.signing_keys):
        _check_key(key, position)
    if job.golden is not None:
        check_rows(job.golden, job.caller.interface, part="golden")
    if job.offload is not None:
        check_offload(job.offload, job.data, job.caller.interface)
    for item in job.recipe.passes:
        item.requires(job.context)


def check_latency_gates(gates: Sequence[Gate], targets: Sequence[str], host: Board) -> None:
    """Refuse a bound on latency for a target of which this host can measure none. Raises ConfigError."""
    for position, gate in enumerate(gates):
        for name in targets if isinstance(gate, MaxLatency) else ():
            target = resolved(name, host)
            if not speaks_for(host, target):
                raise ConfigError(
                    f"gates[{position}] ({gate.kind}): latency is measured on this host ({host.machine}), whose int8 "
                    f"instructions are not those of target {name!r}",
                    hint="leave the gate out and measure on the board, or export for targets=('native',)",
                )


def _check_writable(path: Path, what: str) -> None:
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{path} cannot be written", hint=f"{what} names a file in a folder that can be written")


def _check_report(path: Path) -> None:
    for written in (path, path.with_suffix(".json")):
        _check_writable(written, "report")
    if path.suffix not in (".html", ".htm"):
        raise ConfigError(f"report is {path}, expected an .html file", hint="the same as JSON is written beside it")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", extra="export", purpose="the report's plots")


def _check_tools(job: Job) -> None:
    for model_format in job.formats:
        for package in (*TOOLS[model_format], *(QUANTIZERS[model_format] if job.recipe.quantizations else ())):
            if importlib.util.find_spec(package) is None:
                raise MissingExtra(package, extra="export", purpose=f"exporting to {model_format}")


def _check_labels(interface: Interface) -> None:
    spec = interface.outputs[0]
    if not interface.labels or len(interface.outputs) != 1 or len(spec.shape) != 2 or not spec.batched:
        return
    if spec.shape[1] not in (1, len(interface.labels)):
        raise ConfigError(f"there are {len(interface.labels)} labels, output {spec.name!r} has {spec.shape[1]} classes")


def _check_key(key: Any, position: int) -> None:
    from outrider.bundle import public_bytes

    try:
        public_bytes(key)
    except (AttributeError, TypeError):
        raise ConfigError(
            f"signing_keys[{position}] is a {type(key).__name__}, not an Ed25519 private key",
            hint="outrider.bundle.load_private_key(path)",
        ) from None


def check_targets(targets: Sequence[str], formats: Sequence[str]) -> None:
    """Raises ConfigError for a board that nothing is known of, or one whose engines run none of the formats."""
    for name in targets:
        runs = formats_of(target_named(name))
        if not runs.intersection(formats):
            raise ConfigError(
                f"target {name!r} runs {', '.join(sorted(runs))}, formats is {tuple(formats)}",
                hint=f"formats=({sorted(runs)[0]!r},)",
            )
