"""What a pass is, and how passes run one after the other."""

from __future__ import annotations

import contextlib
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from outrider_exporters.data import Data
from outrider_exporters.measure import Evaluate
from outrider_exporters.rows import example_rows
from outrider_runtimes.errors import ConfigError, ExportError, OutriderError
from outrider_runtimes.tensors import Interface, Tensors

if TYPE_CHECKING:
    from torch import nn

    from outrider_exporters.sources.module import PositionalModule

Fit = Callable[["nn.Module", Any], None]
DIVERGED = "the training diverged: a smaller learning rate, or fewer steps"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a long step is. ``done`` of ``total`` units; ``message`` says what they are; ``left_s`` estimates the
    seconds that the rest takes, where something is known of it."""

    step: str
    done: int
    total: int
    message: str = ""
    left_s: float | None = None


OnProgress = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Show nothing."""


@dataclass(frozen=True, kw_only=True)
class PassContext:
    """What a pass may use besides the network.

    Attributes:
        interface: what the network takes and gives; its inputs are the network's positional arguments in this order.
        example: arrays by input name that fit the interface.
        data: at the network's side of any steps around it.
        fit, teacher, seed, progress: as ``export`` got them.
        evaluate: of a function at the network's side; it takes rows at the caller's.
        asked: the caller's interface and data, for ``evaluate``; None where no steps lie between.
        network: before the passes, for what a pass refuses at once; None: nothing is known of it.
        time_networks: milliseconds a row of each network, by name; see ``passes.latency``. None: not measured.
    """

    interface: Interface
    example: Tensors
    data: Data
    fit: Fit | None = None
    teacher: nn.Module | None = None
    seed: int = 0
    progress: OnProgress = silent
    evaluate: Evaluate | None = None
    asked: tuple[Interface, Data] | None = None
    network: PositionalModule | None = None
    time_networks: Callable[[Mapping[str, nn.Module], PassContext], Mapping[str, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Weight:
    """How heavy a network is: its parameters, and multiply-accumulates of convolutions and matrix products a row."""

    parameters: int
    macs: int


class Pass(Protocol):
    """Changes a network. It is frozen data; the work is in ``call``."""

    kind: ClassVar[str]

    def requires(self, context: PassContext) -> None:
        """Raise ConfigError for what is missing. Asked of every pass before the first one runs."""
        ...

    def call(self, network: PositionalModule, context: PassContext) -> Mapping[str, Any]:
        """Change ``network.module`` in place; give figures for the report.

        ``network(*tensors)`` takes one tensor an input and gives a tuple of one tensor an output, in the interface's
        order, whatever the user's forward takes and returns.
        """
        ...

    def ensures(self, before: Weight, after: Weight) -> None:
        """Raise ExportError when the pass did not do what it is for."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The network after one step.

    Attributes:
        name: ``baseline`` or the pass's kind.
        metrics: what ``evaluate`` gave, in torch.
        parameters: of the network.
        macs: multiply-accumulates a row; None where they are not known.
        seconds: the step took, without its evaluation.
        detail: the pass's own figures.
    """

    name: str
    metrics: Mapping[str, float]
    parameters: int
    macs: int | None
    seconds: float = 0.0
    detail: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As the report stores it."""
        return {
            "name": self.name,
            "metrics": dict(self.metrics),
            "parameters": self.parameters,
            "macs": self.macs,
            "seconds": round(self.seconds, 3),
            "detail": dict(self.detail),
        }


def run_passes(
    network: PositionalModule,
    passes: Sequence[Pass],
    context: PassContext,
    measure: Callable[[nn.Module, str], Mapping[str, float]],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Stage, ...]:
    """Run the passes in place, in order; measure after each.

    Args:
        measure: the metrics of a network; its second argument says after what, for errors.

    Raises:
        ExportError: a pass failed; names it and the passes that ran before it.
    """
    stages: list[Stage] = []
    for position, item in enumerate(passes):
        context.progress(Progress(step="passes", done=position, total=len(passes), message=item.kind))
        before = weigh(network, context)
        begun = clock()
        with _failures_named(item.kind, position, passes), seeded(context.seed + position):
            detail = item.call(network, context)
            network.eval()
            check_finite(network)
            after = weigh(network, context)
            item.ensures(before, after)
        seconds = clock() - begun
        metrics = measure(network.module, f"after {item.kind}")
        stages.append(
            Stage(
                name=item.kind,
                metrics=metrics,
                parameters=after.parameters,
                macs=after.macs,
                seconds=seconds,
                detail=detail,
            )
        )
    return tuple(stages)


def call_fit(network: PositionalModule, context: PassContext) -> None:
    """Fine-tune with the user's ``fit``, in training mode. Raises ExportError when it fails or replaces the network."""
    from torch import nn

    if context.fit is None or context.data.train is None:
        raise ConfigError("fit and data.train are needed to fine-tune")
    network.train()
    try:
        returned: object = context.fit(network.module, context.data.train)
    except Exception as error:
        raise ExportError(f"fit raised {type(error).__name__}: {error}") from error
    if isinstance(returned, nn.Module) and returned is not network.module:
        raise ExportError("fit returned another network", hint="fit(model, train) must train the network in place")
    network.cpu().eval()


def weigh(network: PositionalModule, context: PassContext) -> Weight:
    """Count parameters, and the multiply-accumulates of a run on one row."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from outrider_exporters.sources.module import as_tensors

    row = as_tensors(list(example_rows(context.example, context.interface, 1).values()))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _countable(), counter:
        network(*row)
    return Weight(
        parameters=sum(p.numel() for p in network.parameters()),
        macs=counter.get_total_flops() // 2,
    )


@contextlib.contextmanager
def _countable() -> Iterator[None]:
    """Inside, LSTM, attention and Transformer layers run as products that can be counted, not as one fused kernel."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TF32 on graphics processors
            with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def check_finite(network: PositionalModule) -> None:
    """Raise ExportError for a weight with NaN or infinity, or a buffer with NaN; converters accept these silently."""
    for name, weight in network.module.named_parameters():
        if not bool(weight.isfinite().all()):
            raise ExportError(f"weight {name!r} has NaN or infinite values", hint=DIVERGED)
    for name, buffer in network.module.named_buffers():
        if bool(buffer.isnan().any()):
            raise ExportError(f"buffer {name!r} has NaN values", hint=DIVERGED)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's, numpy's and Python's global generators start at ``seed`` inside and are put back after."""
    import torch

    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


@contextlib.contextmanager
def _failures_named(kind: str, position: int, passes: Sequence[Pass]) -> Iterator[None]:
    """Every failure inside becomes an ExportError with the pass's place; Ctrl-C goes through."""
    before = ", ".join(item.kind for item in passes[:position]) or "none"
    where = f"passes[{position}] ({kind}), passes before it: {before}"
    try:
        yield
    except OutriderError as error:
        raise ExportError(f"{where}: {error}", hint=error.hint) from error
    except Exception as error:
        raise ExportError(f"{where}: {type(error).__name__}: {error}") from error
