"""What answers: the board's model and, where one is configured, the cloud behind it. Each can be replaced."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import outrider
from outrider.agent.config import CloudConfig, ModelConfig, read_secret, tls_of
from outrider.agent.logs import say
from outrider.bundle import find_trust, open_bundle
from outrider.store import Store
from outrider.stream import Stream
from outrider_runtimes.errors import NotInstalled, OutriderError, StoreError

if TYPE_CHECKING:
    from outrider import Hybrid, Model, Policy, Prediction, Remote
    from outrider.spending import Meter
    from outrider_runtimes.tensors import Array, Interface


class Answering:
    """A model, and a hybrid over it and the cloud. Safe from several threads: a change waits for the call that runs.

    Attributes:
        model, cloud, policy: what it is made of now.
    """

    def __init__(
        self,
        model: Model,
        cloud: Remote | None,
        policy: Policy | None,
        *,
        deadline_ms: float | None,
        state: Path,
        meter: Meter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Own both sides. Raises what Hybrid raises; they stay open then.

        Args:
            deadline_ms: of a model without a cloud.
            meter: what the hybrid spends from; its owner closes it.
        """
        self.model = model
        self.cloud = cloud
        self.policy = policy
        self._deadline_ms = deadline_ms
        self._state = state
        self._meter = meter
        self._clock = clock
        self._asked_s: float | None = None
        self._lock = threading.Lock()
        self._hybrid: Hybrid | None = None
        self._attend: Callable[[], None] = lambda: None
        self._combine()

    def attend(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` now and at each new ``face``, before that one is asked: no answer is missed in between."""
        with self._lock:
            self._attend = callback
            callback()

    def between(self, job: Callable[[], None]) -> None:
        """Do something while nothing is answered."""
        with self._lock:
            job()

    @property
    def face(self) -> Model | Hybrid:
        """What a reporter watches; another one after each change."""
        return self.model if self._hybrid is None else self._hybrid

    @property
    def interface(self) -> Interface:
        """What it takes and gives."""
        return self.model.interface

    def infer(self, inputs: Mapping[str, Array]) -> Prediction:
        """Answer one request; a recurrent model keeps its state from call to call. Raises as Hybrid and Model do."""
        with self._lock:
            self._asked_s = self._clock()
            try:
                return self._asked.infer(inputs, deadline_ms=self._deadline_ms)
            finally:
                self._asked_s = None

    @property
    def call_s(self) -> float | None:
        """How long the request that runs has been running; None where none does. A call without a deadline that is
        stuck in an engine shows here and nowhere else. Waits for nothing, from any thread."""
        asked_s = self._asked_s
        return None if asked_s is None else self._clock() - asked_s

    def change(
        self, *, model: Model | None = None, cloud: Remote | None, policy: Policy | None, deadline_ms: float | None
    ) -> None:
        """Answer by others from the next call on, and close what is not used any more. Nothing happens where all is as
        it was: a recurrent model keeps its state, the circuit breaker what it knows.

        Raises:
            InterfaceMismatch, ConfigError, StoreError: they do not fit together; what was answers on.
        """
        before = (self.model, self.cloud, self.policy, self._deadline_ms)
        after = (model or self.model, cloud, policy, deadline_ms)
        if after == before:
            return
        with self._lock:
            self._part()
            self.model, self.cloud, self.policy, self._deadline_ms = after
            try:
                self._combine()
            except BaseException:
                self.model, self.cloud, self.policy, self._deadline_ms = before
                self._combine_again()
                raise
        if before[0] is not self.model:
            before[0].close()
        if before[1] is not None and before[1] is not cloud:
            before[1].close()

    def close(self) -> None:
        """Free all of it."""
        self._part()
        self.model.close()
        if self.cloud is not None:
            self.cloud.close()

    def _combine(self) -> None:
        if self.cloud is not None and self.policy is not None:
            self._hybrid = outrider.Hybrid(self.model, self.cloud, self.policy, state=self._state, meter=self._meter)
        self._asked = Stream(self.face) if self.interface.state else self.face
        self._attend()

    def _combine_again(self) -> None:
        try:
            self._combine()
        except OutriderError as error:
            say("cloud_lost", level=logging.ERROR, error=str(error), hint="the board answers alone; reload")
            self._asked = self.model
            self._attend()

    def _part(self) -> None:
        if self._hybrid is not None:
            self._hybrid.close()
            self._hybrid = None


def open_cloud(config: CloudConfig | None) -> Remote | None:
    """The endpoint; nothing is sent yet. Raises ConfigError."""
    if config is None:
        return None
    token = read_secret(config.token_file, config.token_env)
    return outrider.Remote(config.url, model=config.model, tls=tls_of(config), token=token)


def open_model(config: ModelConfig, name: str, state: Path) -> Model:
    """The installed bundle of that name, opened as the configuration asks for. Raises as ``outrider.load``."""
    options: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("bundle", "deadline_ms")
    }
    return outrider.load(name, state=state, **options)


def install_named(config: ModelConfig, state: Path, *, seeded: str) -> tuple[str, str]:
    """Have what the configuration names installed: a file of which nobody has heard is, once.

    Args:
        seeded: the digest of the file that was installed last time: the store has had its say since then.

    Returns:
        The bundle's name, and the digest to remember; empty where the configuration names what is installed.

    Raises:
        OutriderError: the file is not sound, or was refused and nothing of its name is installed.
    """
    if "/" not in config.bundle:
        return config.bundle, ""
    path = Path(config.bundle)
    with open_bundle(path, find_trust(config.trust, state)) as bundle:
        name, digest = bundle.manifest.name, bundle.manifest.digest
    if digest == seeded and installed_digest(name, state):
        return name, digest
    try:
        outrider.install(path, trust=config.trust, state=state)
    except OutriderError as error:
        if not installed_digest(name, state):
            raise
        say("install_refused", level=logging.ERROR, bundle=path.name, error=str(error), hint=error.hint)
    return name, digest


def installed_digest(name: str, state: Path) -> str:
    """Of what is current under that name; empty where nothing is that can be read."""
    try:
        return Store(state).installed(name).digest
    except (NotInstalled, StoreError):
        return ""


def undo_install(name: str, digest: str, state: Path) -> None:
    """Go back to the bundle with that digest, where another one has become current and cannot be used after all."""
    try:
        if digest and installed_digest(name, state) != digest:
            outrider.rollback(name, state=state)
    except OutriderError as error:
        say("rollback_failed", level=logging.ERROR, error=str(error), hint=error.hint)
