"""What an endpoint offers: models by name and version, each of which says itself what answers now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import ConfigError, UnknownModel
from outrider_runtimes.oip import files_in
from outrider_runtimes.runner import Answer, Runner
from outrider_runtimes.tensors import Interface, Tensors

if TYPE_CHECKING:
    from outrider.model import BundleInfo

# A call of less than that gains nothing by a thread of its own: to wake it, and to be woken by it, takes longer.
QUICK_MS = 0.15


class BundleRunner(Runner, Protocol):
    """A Runner over a bundle, as ``outrider.Model`` is one. What it says here may change between two calls:
    a fresh bundle is rolled back, a hot board steps to another variant.
    """

    @property
    def bundle(self) -> BundleInfo:
        """Which bundle answers now."""
        ...

    @property
    def variant(self) -> str:
        """Which variant of it."""
        ...

    @property
    def engine(self) -> str:
        """On which engine."""
        ...

    @property
    def expected_ms(self) -> float | None:
        """What a call of it takes, by its install; None where that is not known or calls are put together."""
        ...

    @property
    def sick(self) -> bool:
        """Whether a call is taken for stuck, so that nothing more is answered."""
        ...

    def run_here(self, inputs: Tensors, deadline: Deadline) -> Answer | None:
        """Run one request in the calling thread; None where that may not be, and it is to be submitted."""
        ...


@dataclass(frozen=True, kw_only=True)
class Served:
    """One model as it is offered. Everything but ``name`` and ``runner`` is asked of the runner when it is read."""

    name: str
    runner: BundleRunner

    @property
    def interface(self) -> Interface:
        """What it takes and gives."""
        return self.runner.interface

    @property
    def bundle(self) -> str:
        """The digest of the bundle that answers now."""
        return self.runner.bundle.digest

    @property
    def version(self) -> int:
        """The version of the bundle that answers now."""
        return self.runner.bundle.version

    @property
    def variant(self) -> str:
        """The variant that answers now."""
        return self.runner.variant

    @property
    def engine(self) -> str:
        """The engine that it runs on now."""
        return self.runner.engine

    def run_here(self, inputs: Tensors, deadline: Deadline) -> Answer | None:
        """The answer, where to wait for it costs less than to do something else meanwhile; else None."""
        return self.runner.run_here(inputs, deadline) if self._is_quick(inputs) else None

    @cached_property
    def files(self) -> dict[str, int | None]:
        """The inputs that are files; see ``oip.files_in``. The interface stays as it is."""
        return files_in(self.runner.interface)

    @cached_property
    def _batched(self) -> list[str] | None:
        """The inputs with rows; None where other sizes are free."""
        inputs = self.runner.interface.inputs
        if any(None in spec.shape[1 if spec.batched else 0 :] for spec in inputs):
            return None
        return [spec.name for spec in inputs if spec.batched]

    def _is_quick(self, inputs: Tensors) -> bool:
        """By what a call of one row took at install; where other sizes are free, that says nothing of this call."""
        expected_ms = self.runner.expected_ms
        if expected_ms is None or expected_ms > QUICK_MS or self._batched is None:
            return False
        arrays = [inputs[name] for name in self._batched if name in inputs]
        return all(array.ndim == 0 or array.shape[0] * expected_ms <= QUICK_MS for array in arrays)

    @property
    def ready(self) -> bool:
        """Whether it can answer: false while a call is stuck in its engine."""
        return not self.runner.sick


class Models:
    """The models of one endpoint. The highest version of a name is its default.

    Versions are looked up as they are now: after a rollback the name has the version that was good before.
    """

    def __init__(self, served: Iterable[Served] = ()) -> None:
        """Take them in their order. Raises ConfigError for two of one name and version."""
        self._by_name: dict[str, list[Served]] = {}
        for each in served:
            others = self._by_name.setdefault(each.name, [])
            if each.version in [other.version for other in others]:
                raise ConfigError(
                    f"two bundles are named {each.name!r} and have version {each.version}",
                    hint="serve one of them, or export the other one under another version",
                )
            others.append(each)

    def __iter__(self) -> Iterator[Served]:
        return (each for others in self._by_name.values() for each in others)

    def __len__(self) -> int:
        return sum(map(len, self._by_name.values()))

    def names(self) -> tuple[str, ...]:
        """Of all models, each once, in the order in which they were given."""
        return tuple(self._by_name)

    def versions(self, name: str) -> tuple[int, ...]:
        """Those of one name, the lowest first. Raises UnknownModel."""
        return tuple(sorted({each.version for each in self._named(name)}))

    def find(self, name: str, version: str | None = None) -> Served:
        """The model of that name, in that version or in its highest one.

        Raises:
            UnknownModel: there is none; says what there is.
        """
        found = self._named(name)
        if version is None:
            return found[0] if len(found) == 1 else max(found, key=_version)
        for each in found:
            if str(each.version) == version:
                return each
        known = ", ".join(map(str, self.versions(name)))
        raise UnknownModel(f"model {name!r} has no version {version[:16]!r} here", hint=f"it has {known}")

    def _named(self, name: str) -> list[Served]:
        found = self._by_name.get(name)
        if found is None:
            raise UnknownModel(f"there is no model {name[:64]!r} here", hint="GET /v2/models lists them")
        return found


def _version(served: Served) -> int:
    return served.version
