"""The agent itself: one thread reads and answers, another takes commands and reloads, the reporter's two report."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import outrider
from outrider.agent import logs
from outrider.agent.answering import Answering, install_named, installed_digest, open_cloud, open_model, undo_install
from outrider.agent.commands import Refusal
from outrider.agent.config import Config, broker_of, credentials_of, load_config, policy_from
from outrider.agent.control import Control
from outrider.agent.ending import LAST_CALL_S, Bound, flush, leave
from outrider.agent.logs import say
from outrider.agent.loop import Loop
from outrider.agent.memory import Instance, Standing, private_folder, read_standing, write_standing
from outrider.agent.notify import Notifier
from outrider.agent.outputs import AnswerWriter
from outrider.agent.reporting import open_reporter
from outrider.agent.sources import is_same_source, make_source
from outrider.bundle import Trust, find_trust, open_bundle
from outrider.policy import Policy
from outrider.prediction import Prediction
from outrider.spending import Meter, open_meter
from outrider.store import find_state_dir
from outrider.telemetry import Reporter
from outrider.telemetry.mqtt import Message
from outrider.telemetry.sparkplug import SparkplugNode
from outrider_runtimes.clock import clock_is_synchronised
from outrider_runtimes.errors import ConfigError, NotInstalled, OutriderError, TelemetryError
from outrider_runtimes.tensors import Array

LAST_COMMAND_S: Final = 10.0  # at the end, a command that is being done may take so long


def run_agent(path: Path) -> dict[str, Any]:
    """Run the agent of a configuration file until it is told to stop or its source ends. Only from the main thread.

    Returns:
        Why it ended, what it answered, and the account of what was reported.

    Raises:
        ConfigError: the file, naming the key.
        AgentError: another agent runs for the same device.
        OutriderError: the model cannot be installed or opened, or the state directory cannot be used.
    """
    config = load_config(path)
    logs.start(config.log_level)
    state = find_state_dir(config.state)
    folder = private_folder(state, config.device)
    with Instance(folder), contextlib.ExitStack() as stack:
        agent = Agent(config, path, state=state, folder=folder, notifier=Notifier())
        # A reload that is asked for before the agent is ready comes after; a stop need not wait for that.
        stack.enter_context(_signals({signal.SIGHUP: agent.want_reload}))
        stack.callback(agent.close)
        agent.open()
        with _signals({number: partial(agent.stop, number.name) for number in (signal.SIGTERM, signal.SIGINT)}):
            return agent.run()


class Agent:
    """One running agent: what it is made of, what commands do to it (see ``Hands``), and what a reload changes."""

    def __init__(
        self,
        config: Config,
        path: Path,
        *,
        state: Path,
        folder: Path,
        notifier: Notifier,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._path = path
        self._state = state
        self._folder = folder
        self._notifier = notifier
        self._clock = clock
        self._begun_s = clock()
        self._standing = read_standing(folder)
        self._reload = False
        self._reopening = False
        self._meter: Meter | None = None
        self._unwatch: Callable[[], None] = lambda: None
        self._node: SparkplugNode | None = None
        self._closing: list[Callable[[], object]] = []

    def open(self) -> None:
        """Install and open what the configuration names. Raises as ``run_agent``; ``close`` frees what was opened."""
        config = self._config
        if config.commands.enabled and config.commands.bundles is None:
            with contextlib.suppress(OSError):  # a full disk; `install` says what is not there
                self._bundles().mkdir(mode=0o700, exist_ok=True)
        source = make_source(config, self._folder)
        writer = None if config.output is None else AnswerWriter(config.output)
        self._name, seeded = install_named(config.model, self._state, seeded=self._standing.seeded)
        if seeded != self._standing.seeded:
            self._keep(seeded=seeded)
        if config.budget is not None:
            self._meter = open_meter(config.budget, state=self._state)
            self._closing.append(self._meter.close)
        self._answering = self._open_answering(config)
        self._loop = Loop(
            self._answering,
            source,
            config.source,
            writer=writer,
            tell=self._tell,
            failure=self._tell_failure,
            answered=self._tell_inputs,
            beat=self._beat,
            rolled_back=self._reopen_soon,
            paused=self._standing.paused,
            clock=self._clock,
        )
        self._closing += [self._loop.close, self._answering.close]
        self._control = Control(
            self,
            device=config.device,
            trust=self._command_trust(config),
            folder=self._folder,
            post=self._post,
            now_s=_synced_now_s,
        )
        self._opening = threading.RLock()  # a reporter's connection may be there, and have to post, before it is known
        with self._opening:
            self._reporter = self._open_reporter(config)
        self._closing.append(self._close_reporter)
        self._answering.attend(self._watch)
        self._control.start()
        self._closing.append(lambda: self._control.close(LAST_COMMAND_S))

    def _open_answering(self, config: Config) -> Answering:
        model = open_model(config.model, self._name, self._state)
        try:
            return Answering(
                model,
                open_cloud(config.cloud),
                self._policy(config),
                deadline_ms=config.model.deadline_ms,
                state=self._state,
                meter=self._meter,
                clock=self._clock,
            )
        except BaseException:
            model.close()
            raise

    def run(self) -> dict[str, Any]:
        """Read and answer until ``stop``, or the source's end."""
        served = self._model_fields()
        say("ready", device=self._config.device, **served, commands=self._config.commands.enabled)
        self._tell("agent_started", version=outrider.__version__, **served)
        self._notifier.ready()
        with Bound(LAST_CALL_S, lambda: leave(self._reporter, self._answering.call_s)):
            ended = self._loop.run()
        flush(self._reporter)
        outcome = {"ended": ended, **self._loop.counts.to_dict(), "account": self._account()}
        say("ended", **outcome)
        return outcome

    def stop(self, why: str) -> None:
        """End soon. Safe in a signal handler."""
        self._loop.stopped = why

    def want_reload(self) -> None:
        """Read the configuration again soon. Safe in a signal handler."""
        self._reload = True

    def close(self) -> None:
        """Stop what is there, the last first."""
        self._notifier.stopping()
        while self._closing:
            try:
                self._closing.pop()()
            except OutriderError as error:
                say("close_failed", level=logging.ERROR, error=str(error), hint=error.hint)

    # what commands do

    def stats(self) -> dict[str, Any]:
        """How it is: for the acknowledgement of ``stats``."""
        policy, call_s = self._answering.policy, self._answering.call_s
        return {
            "version": outrider.__version__,
            "uptime_s": round(self._clock() - self._begun_s, 1),
            "source": "paused" if self._loop.paused else self._loop.state,
            "call_s": None if call_s is None else round(call_s, 3),
            "sick": self._answering.model.sick,
            **self._loop.counts.to_dict(),
            "model": self._model_fields(),
            "policy": None if policy is None else dataclasses.asdict(policy),
            "account": self._account(),
        }

    def install(self, file: str, digest: str | None) -> dict[str, Any]:
        """Install a bundle of this model out of the folder of bundles, and answer by it."""
        trust = find_trust(self._config.model.trust, self._state)
        path = self._bundles() / file
        if path.is_symlink() or not path.is_file():
            raise Refusal("no_such_bundle", f"there is no bundle {file!r} in the device's folder of bundles")
        with open_bundle(path, trust) as bundle:
            name, found = bundle.manifest.name, bundle.manifest.digest
        if name != self._name:
            raise Refusal("other_model", f"it is {name!r}, and this agent answers by {self._name!r}")
        if digest is not None and digest != found:
            raise Refusal("other_digest", f"its digest is {found}")
        before = installed_digest(self._name, self._state)
        outrider.install(path, trust=trust, state=self._state)
        if found != self._answering.model.bundle.digest:
            try:
                self._reopen()
            except OutriderError:
                undo_install(self._name, before, self._state)
                raise
        return self._model_fields()

    def rollback(self) -> dict[str, Any]:
        """Go back to the bundle that was current before."""
        try:
            outrider.rollback(self._name, state=self._state)
        except NotInstalled:
            raise Refusal("no_earlier_bundle", f"there is no bundle {self._name!r} to go back to") from None
        self._reopen()
        return self._model_fields()

    def set_policy(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Change fields of the policy; the others stay. It holds until the file says another policy than now."""
        policy = self._answering.policy
        if policy is None:
            raise Refusal("no_cloud", "this agent has no [cloud] in its configuration, and so no policy")
        merged = {**dataclasses.asdict(policy), **fields}
        try:
            self._change(policy=policy_from(merged))
        except ConfigError as error:
            raise Refusal("bad_policy", str(error)) from None
        self._keep(policy=merged, over=_digest(self._config.policy))
        self._tell("policy_set", **fields)
        return {"policy": merged}

    def set_paused(self, paused: bool) -> dict[str, Any]:
        """Close the source until ``resume``, restarts included; or open it again."""
        changed = paused != self._standing.paused
        self._keep(paused=paused)
        self._loop.paused = paused
        if changed:
            self._tell("agent_paused" if paused else "agent_resumed")
        return {"paused": paused}

    # changes

    def reload(self) -> None:
        """Read the configuration again; where it cannot be used, the one that is in force stays."""
        self._notifier.reloading()
        try:
            changed = self._apply(load_config(self._path))
        except OutriderError as error:
            say("reload_refused", level=logging.ERROR, error=str(error), hint=error.hint)
            self._tell("reload_refused", error=type(error).__name__)
        else:
            say("reloaded", changed=changed)
            self._tell("reloaded", changed=changed)
        finally:
            self._notifier.ready()

    def _apply(self, new: Config) -> list[str]:
        """Change what is another, and name it. What may fail comes first; then nothing does."""
        old = self._config
        if new.device != old.device or find_state_dir(new.state) != self._state:
            raise ConfigError("device or state is another", hint="that takes a restart")
        if new.budget != old.budget:
            raise ConfigError("budget is another", hint="that takes a restart")
        changed = [f.name for f in dataclasses.fields(new) if getattr(new, f.name) != getattr(old, f.name)]
        source = self._loop.source if is_same_source(old, new) else make_source(new, self._folder)
        trust = self._command_trust(new)
        credentials_of(new.broker)
        broker_of(new.broker)
        writer = AnswerWriter(new.output) if new.output is not None and "output" in changed else None
        try:
            changed += self._answer_by(new, changed)
        except BaseException:
            if writer is not None:
                writer.close()
            raise
        self._control.trust = trust
        if "output" in changed:
            self._loop.write_to(writer)
        # Last what may fail: then the next reload has all of it to do again.
        moved = {"broker", "inputs", "sparkplug"} & {*changed}
        if moved or new.commands.enabled != old.commands.enabled or self._reporter.closed:
            self._answering.between(lambda: self._change_reporter(new))
        else:
            self._config = new
        logs.set_level(new.log_level)
        self._loop.read_from(source, new.source)
        return changed

    def _answer_by(self, new: Config, changed: list[str]) -> list[str]:
        """Answer as the configuration says, and by what is current in the store; ``bundle`` where that is another."""
        answering, model = self._answering, None
        before = installed_digest(self._name, self._state)
        name, seeded = install_named(new.model, self._state, seeded=self._standing.seeded)
        is_another = installed_digest(name, self._state) != answering.model.bundle.digest
        cloud = open_cloud(new.cloud) if "cloud" in changed else answering.cloud
        try:
            if is_another or "model" in changed:
                model = open_model(new.model, name, self._state)
            answering.change(model=model, cloud=cloud, policy=self._policy(new), deadline_ms=new.model.deadline_ms)
        except BaseException:
            for opened in (model, cloud if cloud is not answering.cloud else None):
                if opened is not None:
                    opened.close()
            if name == self._name:
                undo_install(name, before, self._state)
            raise
        self._name = name
        if seeded != self._standing.seeded:
            self._keep(seeded=seeded)
        return ["bundle"] if is_another else []

    def _reopen(self) -> None:
        """Answer by what is current in the store. Raises OutriderError; then what answered answers on."""
        model = open_model(self._config.model, self._name, self._state)
        try:
            self._change(model=model)
        except BaseException:
            model.close()
            raise
        say("model", **self._model_fields())
        self._tell("bundle_opened", **self._model_fields())

    def _reopen_soon(self) -> None:
        """The model went back to a bundle with another interface; until it is opened, every input fails."""
        if not self._reopening:
            self._reopening = self._control.submit(self._reopen_now)

    def _reopen_now(self) -> None:
        try:
            self._reopen()
        except OutriderError as error:
            say("model_lost", level=logging.ERROR, error=str(error), hint=error.hint)
        finally:
            self._reopening = False

    def _change(self, **parts: Any) -> None:
        answering = self._answering
        whole = {"cloud": answering.cloud, "policy": answering.policy, "deadline_ms": self._config.model.deadline_ms}
        answering.change(**{**whole, **parts})

    def _watch(self) -> None:
        """Report what answers now; called while nothing does."""
        self._unwatch()
        self._unwatch = self._reporter.watch(self._answering.face)

    def _open_reporter(self, config: Config) -> Reporter:
        commands = (self._control.attachment,) if config.commands.enabled else ()
        reporter, self._node = open_reporter(
            config, state=self._state, folder=self._folder, meter=self._meter, attachments=commands, post=self._post
        )
        return reporter

    def _change_reporter(self, new: Config) -> None:
        """By another broker. The spool is one file: the old one is closed first."""
        old = self._config
        self._close_reporter()
        try:
            with self._opening:
                self._reporter = self._open_reporter(new)
            self._config = new
        except OutriderError as error:
            say("broker_refused", level=logging.ERROR, error=str(error), hint=error.hint)
            with self._opening:
                self._reporter = self._open_reporter(old)
            # So that the next reload tries it again.
            kept = {name: getattr(old, name) for name in ("broker", "inputs", "sparkplug", "commands")}
            self._config = dataclasses.replace(new, **kept)
        self._watch()

    def _policy(self, config: Config) -> Policy | None:
        """The file's policy, or the one that a command set over it."""
        standing = self._standing
        if config.policy is None or standing.policy is None or standing.over != _digest(config.policy):
            return config.policy
        try:
            return policy_from(standing.policy)
        except ConfigError as error:  # set under another version of Outrider
            say("policy_forgotten", level=logging.WARNING, error=str(error))
            return config.policy

    def _command_trust(self, config: Config) -> Trust:
        if not config.commands.enabled:
            return Trust()
        keys = config.commands.keys
        return find_trust(config.model.trust if keys is None else keys, self._state)

    def _bundles(self) -> Path:
        return self._config.commands.bundles or self._state / "bundles"

    def _keep(self, **changes: Any) -> None:
        standing: Standing = dataclasses.replace(self._standing, **changes)
        write_standing(self._folder, standing)
        self._standing = standing

    def _model_fields(self) -> dict[str, Any]:
        model = self._answering.model
        bundle = model.bundle
        return {
            "name": bundle.name,
            "bundle_version": bundle.version,
            "digest": bundle.digest,
            "variant": model.variant,
            "engine": model.engine,
        }

    def _tell(self, name: str, /, **fields: Any) -> None:
        try:
            self._reporter.event(name, **fields)
        except TelemetryError as error:
            say("event_lost", level=logging.WARNING, name=name, error=str(error))

    def _tell_failure(self, error: Exception) -> None:
        with contextlib.suppress(TelemetryError):  # between two reporters
            self._reporter.failure(error)

    def _tell_inputs(self, inputs: Mapping[str, Array], prediction: Prediction) -> None:
        if self._config.inputs is not None:
            with contextlib.suppress(TelemetryError):
                self._reporter.report_inputs(inputs, prediction)

    def _post(self, message: Message) -> bool:
        with self._opening:
            reporter = self._reporter
        return reporter.post(message)

    def _account(self) -> dict[str, Any]:
        return dataclasses.asdict(self._reporter.account())

    def _beat(self) -> None:
        """Several times a second, while the loop comes round."""
        self._notifier.alive()
        if self._reload:
            self._reload = False
            if not self._control.submit(self.reload):  # commands are in its way: again at the next turn
                self._reload = True

    def _close_reporter(self) -> None:
        self._unwatch()
        self._unwatch = lambda: None
        if self._node is not None:
            self._node.close()
        self._reporter.close()


def _digest(policy: Policy | None) -> str:
    fields = None if policy is None else dataclasses.asdict(policy)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _synced_now_s() -> float | None:
    return time.time() if clock_is_synchronised() else None


@contextlib.contextmanager
def _signals(calls: Mapping[signal.Signals, Callable[[], None]]) -> Iterator[None]:
    """What these signals do meanwhile."""

    def handler(number: int, _: Any) -> None:
        calls[signal.Signals(number)]()

    before = {number: signal.signal(number, handler) for number in calls}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
