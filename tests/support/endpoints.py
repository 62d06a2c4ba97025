"""Served models without a bundle: what a registry and the counts look at, and a runner over numpy that is named."""

from __future__ import annotations

from outrider.endpoint.models import Served
from outrider.model import BundleInfo
from outrider_runtimes import runner
from outrider_runtimes.tensors import Interface
from support.runners import INTERFACE, NumpyRunner


class Said:
    """The part of a BundleRunner that a registry looks at."""

    def __init__(self, version: int, *, name: str = "digits") -> None:
        self.bundle = BundleInfo(name=name, version=version, digest=f"{version:064x}", verified=True)
        self.variant, self.engine, self.sick = "onnx-int8", "onnxruntime", False


def served(version: int, name: str = "digits") -> Served:
    return Served(name=name, runner=Said(version, name=name))  # type: ignore[arg-type]


class Named(NumpyRunner):
    """`logits = x * gain` in the name of a bundle, which may become another one, as by a rollback."""

    def __init__(
        self, version: int = 3, *, name: str = "digits", gain: float = 1.0, interface: Interface = INTERFACE
    ) -> None:
        super().__init__(gain=gain, interface=interface)
        self.sick = False
        self.become(version, name=name)

    def become(self, version: int, *, name: str = "digits", variant: str = "onnx-int8") -> None:
        self.bundle = BundleInfo(name=name, version=version, digest=f"{version:064x}", verified=False)
        self.variant, self.engine = variant, "onnxruntime"
        self.served = runner.Served(variant=variant, engine=self.engine, bundle=self.bundle.digest, verified=False)
