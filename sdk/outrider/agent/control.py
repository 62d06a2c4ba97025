"""Who takes an agent's commands: one at a time, on a thread of its own, so that answering goes on.

A signed command is on disk as taken before anything is done, and as done after it: it is never done twice, whatever
the power does.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from outrider.agent.commands import (
    KINDS,
    Acknowledgement,
    Command,
    Received,
    Refusal,
    Result,
    acknowledgement_topic,
    command_topic,
    judge,
    read_command,
    write_acknowledgement,
)
from outrider.agent.logs import say
from outrider.agent.memory import MAX_TAKEN, Taken, past_of, read_taken, write_taken
from outrider.bundle import Trust
from outrider.telemetry.attachment import Attachment
from outrider.telemetry.mqtt import Message
from outrider_runtimes.errors import OutriderError, StoreError

MAX_WAITING: Final = 64  # a flood is dropped here, and counted

Job = Callable[[], None]


class Hands(Protocol):
    """What commands do. Each gives what the acknowledgement says beside ``ok``; raises OutriderError where it failed
    and Refusal where it was not begun."""

    def stats(self) -> Mapping[str, Any]:
        """How the agent is."""
        ...

    def install(self, file: str, digest: str | None) -> Mapping[str, Any]:
        """Install a bundle out of the folder for that, and answer by it."""
        ...

    def rollback(self) -> Mapping[str, Any]:
        """Go back to what was current before."""
        ...

    def set_policy(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Change fields of the policy."""
        ...

    def set_paused(self, paused: bool) -> Mapping[str, Any]:
        """Stop reading the source, or go on."""
        ...


class Control:
    """Takes the commands of one device.

    Attributes:
        trust: the keys that may command; another one after a reload.
        dropped: messages that came while too many waited, or that cannot be read.
    """

    def __init__(
        self,
        hands: Hands,
        *,
        device: str,
        trust: Trust,
        folder: Path,
        post: Callable[[Message], bool],
        now_s: Callable[[], float | None],
    ) -> None:
        """Begin to work.

        Args:
            folder: the agent's private one.
            post: sends an acknowledgement.
            now_s: seconds since 1970; None while the clock is not known to be right.
        """
        self.trust = trust
        self.dropped = 0
        self._hands = hands
        self._device = device
        self._folder = folder
        self._post = post
        self._now_s = now_s
        self._topics = (command_topic(device), acknowledgement_topic(device))
        self._jobs: queue.Queue[Job | None] = queue.Queue(maxsize=MAX_WAITING)
        self._closing = False
        self._damage: StoreError | None = None
        self._taken: tuple[Taken, ...] = ()
        try:
            self._taken = read_taken(folder)
        except StoreError as error:
            self._damage = error
            say("commands_lost", level=logging.ERROR, error=str(error), hint=error.hint)
        self._thread = threading.Thread(target=self._work, name="outrider-control", daemon=True)

    @property
    def sequence(self) -> int:
        """The highest number that was taken."""
        return past_of(self._taken).last

    @property
    def attachment(self) -> Attachment:
        """What a reporter needs to hear commands."""
        return Attachment(subscriptions=(self._topics[0],), message=self.hear)

    def start(self) -> None:
        """Begin to work; a command in which the process died is answered as interrupted."""
        self._thread.start()
        if self._taken and self._taken[-1].open:
            say("command_interrupted", level=logging.WARNING, sequence=self.sequence)
            self._answer(self._taken[-1].acknowledgement)

    def hear(self, topic: str, payload: bytes, retained: bool) -> None:
        """A message on the topic of commands. A retained one is old, whoever it was meant for."""
        if retained:
            say("command_ignored", level=logging.WARNING, reason="retained", topic=topic)
        elif not self.submit(lambda: self.handle(payload)):
            self._drop("too many wait")

    def submit(self, job: Job) -> bool:
        """Have something done in the order of the commands. From any thread; False when too much waits."""
        if self._closing:
            return False
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return False
        return True

    def close(self, timeout_s: float) -> None:
        """End after what is being done; whoever is still at it then is left to the end of the process."""
        self._closing = True
        with contextlib.suppress(queue.Full):
            self._jobs.put_nowait(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def handle(self, payload: bytes) -> None:
        """One command from its bytes to its acknowledgement."""
        try:
            received = read_command(payload)
        except Refusal as error:
            self._drop(str(error))
            return
        command = received.command
        try:
            fresh = judge(
                received, device=self._device, trust=self.trust, past=past_of(self._taken), now_s=self._now_s()
            )
        except Refusal as error:
            say("command_refused", level=logging.WARNING, command=command.name, reason=error.reason, error=str(error))
            self._answer(self._said(command, "refused", error.reason, f"{error}"))
            return
        if not KINDS[command.name].signed:
            self._answer(self._done(command))
        elif fresh:
            self._take(received)
        else:
            self._answer(next(each.acknowledgement for each in self._taken if each.sequence == command.sequence))

    def _take(self, received: Received) -> None:
        command = received.command
        interrupted = self._said(command, "failed", "interrupted", "the agent ended while it was at it")
        if not self._note(received, interrupted, open_=True):
            detail = "nothing was done: it cannot be recorded"
            self._answer(self._said(command, "failed", "not_recorded", detail, taken=False))
            return
        say("command", command=command.name, sequence=command.sequence, key=received.key)
        acknowledgement = self._done(command)
        self._note(received, acknowledgement, open_=False)
        self._answer(acknowledgement)

    def _note(self, received: Received, acknowledgement: Acknowledgement, *, open_: bool) -> bool:
        sequence = received.command.sequence
        assert sequence is not None
        taken = Taken(sequence=sequence, digest=received.digest, acknowledgement=acknowledgement, open=open_)
        others = tuple(each for each in self._taken if each.sequence != sequence)
        after = (*others, taken)[-MAX_TAKEN:]
        try:
            if self._damage is not None:
                raise self._damage
            write_taken(self._folder, after)
        except OutriderError as error:
            say("command_not_recorded", level=logging.ERROR, sequence=sequence, error=str(error), hint=error.hint)
            if open_:
                return False
        self._taken = after
        return True

    def _done(self, command: Command) -> Acknowledgement:
        """Do it. Whatever happens, there is an acknowledgement; what went wrong in detail is in the log alone."""
        try:
            return self._said(command, "ok", data=self._act(command))
        except Refusal as error:
            say("command_refused", level=logging.WARNING, command=command.name, reason=error.reason, error=str(error))
            return self._said(command, "refused", error.reason, str(error))
        except OutriderError as error:
            say("command_failed", level=logging.ERROR, command=command.name, error=str(error), hint=error.hint)
            return self._said(command, "failed", type(error).__name__, "the device's log says more")
        except Exception:
            logging.getLogger(__name__).exception("command %s failed", command.name)
            return self._said(command, "failed", "internal", "a fault of Outrider's; the device's log says more")

    def _act(self, command: Command) -> Mapping[str, Any]:
        arguments = command.arguments
        actions: Mapping[str, Callable[[], Mapping[str, Any]]] = {
            "ping": dict,
            "stats": self._hands.stats,
            "install": lambda: self._hands.install(arguments["file"], arguments.get("digest")),
            "rollback": self._hands.rollback,
            "set_policy": lambda: self._hands.set_policy(arguments["policy"]),
            "pause": lambda: self._hands.set_paused(True),
            "resume": lambda: self._hands.set_paused(False),
        }
        return actions[command.name]()

    def _said(
        self,
        command: Command,
        result: Result,
        reason: str = "",
        detail: str = "",
        data: Mapping[str, Any] | None = None,
        *,
        taken: bool = True,
    ) -> Acknowledgement:
        counts = taken and KINDS[command.name].signed and result != "refused"
        sequence = command.sequence if counts else None
        return Acknowledgement(
            command=command.id,
            device=self._device,
            name=command.name,
            result=result,
            reason=reason,
            detail=detail,
            sequence=max(self.sequence, sequence or 0),
            data=dict(data or {}),
        )

    def _answer(self, acknowledgement: Acknowledgement) -> None:
        if not self._post(Message(topic=self._topics[1], payload=write_acknowledgement(acknowledgement))):
            say("acknowledgement_lost", level=logging.WARNING, command=acknowledgement.name)

    def _drop(self, why: str) -> None:
        self.dropped += 1
        if self.dropped & (self.dropped - 1) == 0:  # 1, 2, 4, 8...: a flood is not answered by one in the log
            say("command_dropped", level=logging.WARNING, dropped=self.dropped, error=why)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._closing:
            try:
                job()
            except Exception:  # the next command has to be heard
                logging.getLogger(__name__).exception("a job of the agent failed")
