"""What an agent reports through: the reporter and, where that is asked for, an edge node of Sparkplug beside it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from outrider.agent.config import Config, broker_of, credentials_of
from outrider.spending import Meter
from outrider.telemetry import Reporter, homeassistant
from outrider.telemetry.attachment import Attachment
from outrider.telemetry.inputs import InputPolicy
from outrider.telemetry.mqtt import Message
from outrider.telemetry.publisher import Limits
from outrider.telemetry.sparkplug import SparkplugNode

log = logging.getLogger(__name__)


def open_reporter(
    config: Config,
    *,
    state: Path,
    folder: Path,
    meter: Meter | None,
    attachments: Sequence[Attachment],
    post: Callable[[Message], bool],
) -> tuple[Reporter, SparkplugNode | None]:
    """Open both; the node is told what the reporter sums up. Whoever has them closes the node first.

    Args:
        folder: the agent's private one.
        attachments: what listens on the reporter's connection.
        post: the reporter's, by whatever reporter there is when it is called.

    Raises:
        ConfigError, MissingExtra, StateDirectoryError, TelemetryError: as Reporter and SparkplugNode do.
    """
    broker, inputs = config.broker, config.inputs
    tls, credentials = broker_of(broker).tls, credentials_of(broker)
    reporter = Reporter(
        broker.url,
        device=config.device,
        tls=tls,
        credentials=credentials,
        state=state,
        commit_interval_ms=broker.commit_interval_ms,
        max_bytes=broker.spool_max_bytes,
        max_age_s=broker.spool_max_age_s,
        sample=broker.sample,
        metrics_interval_s=broker.metrics_interval_s,
        home_assistant=broker.home_assistant,
        inputs=None if inputs is None else InputPolicy(**dataclasses.asdict(inputs)),
        limits=Limits(batch_records=broker.batch_records, bytes_per_s=broker.drain_bytes_per_s),
        meter=meter,
        attachments=(*attachments, *_taking_back(config, folder, post)),
    )
    if config.sparkplug is None:
        return reporter, None
    try:
        node = SparkplugNode(
            broker.url,
            group=config.sparkplug.group,
            device=config.device,
            tls=tls,
            credentials=credentials,
            state=state,
        )
    except BaseException:
        reporter.close()
        raise
    reporter.on_vitals(node.tell)
    return reporter, node


def _taking_back(config: Config, folder: Path, post: Callable[[Message], bool]) -> Sequence[Attachment]:
    """Where Home Assistant was told of this device and the file does not ask for that any more: what takes it out."""
    mark = folder / "home-assistant"
    if not config.broker.home_assistant:
        forget = partial(mark.unlink, missing_ok=True)
        return (homeassistant.removal(device=config.device, post=post, done=forget),) if mark.exists() else ()
    try:
        mark.touch(mode=0o600)
    except OSError as error:  # a full disk; `homeassistant.remove` does it by hand
        log.warning("that Home Assistant is told cannot be noted: %s", error)
    return ()
