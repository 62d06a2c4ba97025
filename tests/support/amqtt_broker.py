"""amqtt, a broker that knows MQTT 3.1.1 alone, in a process of its own. Argument: the port."""

from __future__ import annotations

import asyncio
import sys

from amqtt.broker import Broker


async def main() -> None:
    config = {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{sys.argv[1]}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }
    await Broker(config).start()
    await asyncio.Event().wait()


asyncio.run(main())
