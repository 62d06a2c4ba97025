"""amqtt, a broker that knows MQTT 3.1.1 alone, in a process of its own. Argument: the port.

It refuses subscriptions to the topic ``prohibited``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from support.ports import free_port


async def main() -> None:
    from amqtt.broker import Broker

    config = {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{sys.argv[1]}"}},
        "plugins": {
            "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True},
            "amqtt.plugins.topic_checking.TopicTabooPlugin": {},
        },
    }
    await Broker(config).start()
    await asyncio.Event().wait()


@contextlib.contextmanager
def running_amqtt() -> Iterator[str]:
    """The url of one that is starting; a client tries again until it is there."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "support.amqtt_broker", str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as broker:
        try:
            yield f"mqtt://127.0.0.1:{port}"
        finally:
            broker.kill()


if __name__ == "__main__":
    asyncio.run(main())
