"""Messages of devices that do not exist, in the form of docs/telemetry.md."""

from __future__ import annotations

import json
import math
import random
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from outrider.telemetry.metrics import latency_bucket
from outrider.telemetry.record import Row, State, encode_batch, encode_info, encode_row, encode_status, topics
from support.sparkplug import Seen
from support.telemetry import BOOT

START_S = 1_764_000_000.0


def metrics_body(
    latencies_ms: list[float], *, cloud: int = 0, degraded: int = 0, temperature_c: float | None = 50.0, **fields: Any
) -> dict[str, Any]:
    """The body of a ``metrics`` record over those waits, of which the first came from the cloud."""
    edge = len(latencies_ms) - cloud - degraded
    sources = (("edge", "confident", edge), ("cloud", "uncertain", cloud), ("edge_degraded", "cloud_late", degraded))
    return {
        "interval_s": 60.0,
        "predictions": len(latencies_ms),
        "counts": [
            {"source": source, "reason": reason, "variant": "onnx-int8", "count": count}
            for source, reason, count in sources
            if count
        ],
        "failures": {},
        "offload_share": cloud / len(latencies_ms) if latencies_ms else None,
        "latency_ms": {
            "count": len(latencies_ms),
            "sum": sum(latencies_ms),
            "max": max(latencies_ms, default=0.0),
            "buckets": sorted(Counter(map(latency_bucket, latencies_ms)).items()),
        },
        "temperature_c": temperature_c,
        "throttled": False,
        "memory_rss_bytes": 46_137_344,
        "drift": None,
        **fields,
    }


@dataclass
class Simulated:
    """One device: each call makes its next message."""

    name: str
    model: str = "digits"
    version: int = 3
    variant: str = "onnx-int8"
    stream: str = field(default_factory=lambda: str(uuid.uuid4()))
    seq: int = 0

    def status(self, state: State = "online", *, reason: str = "connected") -> Seen:
        payload = encode_status(
            state, device=self.name, stream=self.stream, boot_id=BOOT, reason=reason, wall_s=START_S
        )
        return Seen(topic=topics(self.name).status, payload=payload, qos=1, retain=True)

    def info(self) -> Seen:
        bundle = {"name": self.model, "version": self.version, "digest": "ab" * 32, "verified": True}
        bundle |= {"interface": "cd" * 32, "variant": self.variant, "engine": "onnxruntime"}
        payload = encode_info(
            device=self.name,
            stream=self.stream,
            boot_id=BOOT,
            wall_s=START_S,
            software={"outrider": "0.1.0", "python": "3.11.9"},
            board={"machine": "aarch64", "features": [], "cpus": 4, "memory_bytes": 2**33},
            bundles=[bundle],
        )
        return Seen(topic=topics(self.name).info, payload=payload, qos=1, retain=True)

    def records(self, *bodies: tuple[str, dict[str, Any]], at_s: float = START_S) -> Seen:
        """One batch of records: kind and body of each."""
        rows = []
        for kind, body in bodies:
            self.seq += 1
            rows.append(Row(self.seq, encode_row(kind=kind, boot_id=BOOT, wall_s=at_s, monotonic_s=1.0, body=body)))
        payload = encode_batch(device=self.name, stream=self.stream, after_seq=self.seq - len(rows), rows=rows)
        return Seen(topic=topics(self.name).records, payload=payload, qos=1, retain=False)

    def metrics(self, latencies_ms: list[float], *, at_s: float = START_S, **fields: Any) -> Seen:
        return self.records(("metrics", metrics_body(latencies_ms, **fields)), at_s=at_s)

    def event(self, name: str, *, at_s: float = START_S, **fields: Any) -> Seen:
        return self.records(("event", {"name": name, "fields": fields}), at_s=at_s)

    def prediction(self, total_ms: float, *, source: str = "edge", at_s: float = START_S) -> Seen:
        body = {"source": source, "reason": "local", "timing_ms": {"total": total_ms}}
        return self.records(("prediction", body), at_s=at_s)


def a_story(*, until_s: float, minutes: int = 45, seed: int = 7) -> Iterator[Seen]:
    """What a fleet of eight says in that time: one is hot, one cut off, one is degraded, one has rolled back."""
    rng = random.Random(seed)
    names = ("dock-cam-1", "dock-cam-2", "gate-north", "gate-south", "line-3", "line-4", "press-07", "yard-gw")
    fleet = [Simulated(name, model="sorter" if name.startswith("line") else "digits") for name in names]
    for number, device in enumerate(fleet):
        device.version = 4 if device.name == "line-4" else 3
        yield device.status()
        yield device.info()
        for minute in range(minutes):
            at_s = until_s - 60.0 * (minutes - 1 - minute)
            wave = math.sin(minute / 9.0 + number)
            base = 2.5 + 1.4 * number + 0.5 * wave + (3.0 if device.name == "line-3" and minute > 30 else 0.0)
            answers = int(240 + 60 * wave + 30 * number)
            cloud = int(answers * max(0.01, 0.06 + 0.05 * wave))
            yield device.metrics(
                [rng.lognormvariate(math.log(base), 0.35) for _ in range(answers)],
                at_s=at_s,
                cloud=cloud,
                degraded=answers // 6 if device.name == "yard-gw" and minute > 35 else 0,
                temperature_c=round(48.0 + 3.0 * number + 2.0 * wave + (8.0 if device.name == "press-07" else 0.0), 1),
                throttled=device.name == "press-07" and minute > 32,
            )
    by_name = {device.name: device for device in fleet}
    hot = {"reason": "81 C", "before": "onnx-float32", "after": "onnx-int8"}
    yield by_name["press-07"].event("step_down", at_s=until_s - 700.0, **hot)
    yield by_name["line-4"].event("rollback", at_s=until_s - 2100.0, reason="latency of a fresh bundle")
    yield by_name["line-3"].event("drift", at_s=until_s - 320.0, score=0.41)
    yield by_name["gate-south"].status("offline", reason="lost")


def damaged(seen: Seen, rng: random.Random) -> bytes:
    """The payload with some bytes flipped, or cut, or with another value somewhere in its JSON."""
    data = bytearray(seen.payload)
    way = rng.randrange(3)
    if way == 0:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if way == 1:
        return bytes(data[: rng.randrange(len(data))])
    fields = json.loads(data)
    at: Any = fields
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = rng.choice(keys)
        inner = at[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            at = inner
            continue
        at[key] = rng.choice([None, -1, 2**63, 1e300, "", "<b>", [], {}, True, [[[]]], "\u202e\x1b[2J"])
        return json.dumps(fields).encode()
