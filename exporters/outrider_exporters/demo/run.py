"""The demo's six steps, and the figures that come out of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from outrider_exporters.demo.console import Narrator
from outrider_exporters.demo.data import GENTLE, STREAM, Digits, Part, disturbed, load_digits
from outrider_exporters.demo.score import (
    SERVICE_COLUMNS,
    accuracy,
    kept_wrong,
    labels_of,
    margin_threshold,
    margins_of,
    paired_interval,
    service_quality,
    service_rows,
)
from outrider_exporters.demo.stream import DEADLINE_MS, Cast, Outcome, run_stream
from outrider_runtimes.errors import ConfigError, ExportError

if TYPE_CHECKING:
    from outrider_exporters import Offload

STEPS = 6
MARK = ".outrider-demo"  # in a folder that the demo may empty
CACHE = "cache"
RISK = 0.05  # share of wrong answers that the board may keep
DELTA = 0.1  # the probability that a certificate of it does not hold
CERTIFICATION_SAMPLES = 4_000  # ten times the fewest: the surest of the answers may be wrong now and then
MAX_DROP_POINTS = 1.0
GATE_SAMPLES = 2_000
CALIBRATION_SAMPLES = 1_000
FINE_TUNING_SAMPLES = 8_000
GOLDEN_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user may choose.

    Attributes:
        output: folder for everything that the demo writes.
        broker: URL of an MQTT broker; None starts the demo's own.
        stream: inputs that the device answers.
        rate_hz: inputs a second.
        seed: of every random choice.
    """

    output: Path
    broker: str | None
    stream: int
    rate_hz: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The two bundles, and the export's own report of the small one; ``uncertified``: why it has no threshold."""

    bundle: Path
    cloud_bundle: Path
    trust: Path
    report: dict[str, Any]
    uncertified: str


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Per input of the stream whether each side was right, and what was sent; ``served``: the board's variant."""

    served: str
    edge: NDArray[np.bool_]
    cloud: NDArray[np.bool_]
    hybrid: NDArray[np.bool_]
    outage: dict[str, Any]
    offloaded: float


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """When an answer is asked of the cloud: below ``min_margin``; None where the bundle says so of each variant, and
    that is certified. ``text`` is what is to be said of it."""

    min_margin: float | None
    text: str


def run_demo(settings: Settings, say: Narrator) -> dict[str, Any]:
    """Run all steps; return what ``--json`` prints."""
    from outrider_exporters.demo.report import write_report

    folder = settings.output.resolve()
    _prepare(folder)
    digits = load_digits(settings.seed)
    with say.step("train a small network for the board and a strong one for the cloud"):
        small, strong, trained = _train(digits, settings.seed, folder / CACHE, say)
    with say.step("prune, distil and quantize the small one; pack and sign the bundles"):
        exported = _export((small, strong), digits, settings.seed, folder, say)
        threshold = _threshold(exported, digits, settings, folder)
        say.say(threshold.text)
    stream = disturbed(digits.test, settings.stream, STREAM, np.random.default_rng(settings.seed + 2))
    cast = Cast(
        folder=folder,
        bundle=exported.bundle,
        cloud_bundle=exported.cloud_bundle,
        trust=exported.trust,
        broker_url=settings.broker,
        rate_hz=settings.rate_hz,
        min_margin=threshold.min_margin,
    )
    outcome = run_stream(cast, stream.images, say)
    with say.step("score the answers"):
        scored = _score(exported, stream, outcome, folder)
        result = _result(exported, scored, outcome, trained=trained, seed=settings.seed)
        result["threshold"] = {**asdict(threshold), "kept_wrong": kept_wrong(outcome.answers, scored.hybrid)}
    with say.step("write the report"):
        path = write_report(folder / "report.html", result, outcome, deadline_ms=DEADLINE_MS)
        say.say(str(path))
    return {**result, "report": str(path)}


def _prepare(folder: Path) -> None:
    """An empty folder but for the cache of trained weights. Raises ConfigError for one that holds anything else.

    The demo empties what it finds, so it takes a new folder, an empty one, or one that an earlier demo marked.
    """
    hint = "name a new folder: --output FOLDER"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        items = {item.name: item for item in folder.iterdir()}
        if items and MARK not in items:
            raise ConfigError(f"--output {folder} holds files that are not an earlier demo's", hint=hint)
        (folder / MARK).touch()
        for name in items.keys() - {MARK, CACHE}:
            _remove(items[name])
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be written: {error.strerror}", hint=hint) from None


def _remove(item: Path) -> None:
    if item.is_dir() and not item.is_symlink():
        shutil.rmtree(item)
    else:
        item.unlink()


def _train(digits: Digits, seed: int, cache: Path, say: Narrator) -> tuple[Any, Any, bool]:
    from outrider_exporters.demo.networks import trained_small, trained_strong

    small, small_trained = trained_small(digits.train, seed=seed, cache=cache)
    strong, strong_trained = trained_strong(digits.train, seed=seed, cache=cache)
    for name, model, was in (("board", small, small_trained), ("cloud", strong, strong_trained)):
        count = sum(parameter.numel() for parameter in model.parameters())
        say.say(f"{name}: {count:,} parameters, {'trained' if was else 'weights from the cache'}")
    return small, strong, small_trained or strong_trained


Report = TypeVar("Report")


def certified_if_possible(
    make: Callable[[Offload | None], Report], offload: Offload, say: Narrator
) -> tuple[Report, str]:
    """An export with a certified threshold; where that cannot be had, one without, and why."""
    try:
        return make(offload), ""
    except ExportError as error:
        if not str(error).startswith("offload: "):
            raise
        say.say(f"no certified threshold, so again without: {error}")
        return make(None), str(error)


def _export(models: tuple[Any, Any], digits: Digits, seed: int, folder: Path, say: Narrator) -> Exported:
    from outrider.bundle import generate_key, save_keypair
    from outrider_exporters import Distill, MaxDrop, Offload, Prune, Quantize, Recipe, export
    from outrider_exporters.demo.networks import train

    small, strong = models
    key = generate_key()
    _, trust = save_keypair(folder / "keys", "demo", key)
    common = {**_common(digits, seed), "signing_keys": [key]}

    def fit(model: Any, part: Any) -> None:
        images, labels = part
        train(model, Part(images=images["image"], labels=labels), epochs=3, learning_rate=1e-3, seed=seed)

    def make(offload: Offload | None) -> Any:
        return export(
            small,
            **common,
            name="digits",
            fit=fit,
            teacher=strong,
            recipe=Recipe([Prune(ratio=0.5), Distill(temperature=4.0), Quantize("int8")]),
            formats=("onnx", "tflite"),
            gates=[MaxDrop("accuracy", points=MAX_DROP_POINTS)],
            offload=offload,
            output=folder / "digits.outrider",
            report=folder / "export.html",
            progress=show,
        )

    with say.activity() as show:
        report, uncertified = certified_if_possible(make, Offload(alpha=RISK, delta=DELTA), say)
        export(strong, **common, name="digits-large", formats=("onnx",), output=folder / "digits-large.outrider")
    say.say(f"what the export did, layer by layer: {folder / 'export.html'}")
    for stage in (report.baseline, *report.stages):
        say.say(f"{stage.name}: {stage.parameters:,} parameters, accuracy {stage.metrics['accuracy']:.2%}")
    return Exported(
        bundle=folder / "digits.outrider",
        cloud_bundle=folder / "digits-large.outrider",
        trust=trust,
        report=report.to_dict(),
        uncertified=uncertified,
    )


def _common(digits: Digits, seed: int) -> dict[str, Any]:
    """What both exports are given. The rows of the certificate are drawn as the stream is, and from the same images."""
    from outrider_exporters import Data

    rng = np.random.default_rng(seed + 1)
    train_part = disturbed(digits.train, FINE_TUNING_SAMPLES, GENTLE, rng)
    test = disturbed(digits.test, GATE_SAMPLES, GENTLE, rng)
    certification = disturbed(digits.test, CERTIFICATION_SAMPLES, STREAM, rng)
    return {
        "example": {"image": digits.calibration.images[:1]},
        "outputs": ["logits"],
        "labels": tuple("0123456789"),
        "data": Data(
            train=({"image": train_part.images}, train_part.labels),
            calibration={"image": disturbed(digits.calibration, CALIBRATION_SAMPLES, STREAM, rng).images},
            certification=({"image": certification.images}, certification.labels),
            test=test,
        ),
        "golden": {"image": digits.test.images[:GOLDEN_ROWS]},
        "evaluate": accuracy,
        "seed": seed,
    }


def _load(bundle: Path, exported: Exported, state: Path) -> Any:
    import outrider

    return outrider.load(bundle, trust=exported.trust, state=state)


def _threshold(exported: Exported, digits: Digits, settings: Settings, folder: Path) -> Threshold:
    """What the export certified; where it could not, a plug-in estimate of this machine's variant."""
    if rule := exported.report["offload"]:
        return Threshold(
            min_margin=None,
            text=(
                f"The threshold is certified by Learn-then-Test on {rule['rows']:,} images: with probability "
                f"{1.0 - DELTA:g} over them at most {RISK:.0%} of the answers that the board keeps are wrong. They are "
                f"drawn as the stream is, from the same {len(digits.test.labels)} handwritten images, which no network "
                "was trained on; of other handwriting it says nothing."
            ),
        )
    part = disturbed(digits.calibration, CALIBRATION_SAMPLES, STREAM, np.random.default_rng(settings.seed + 3))
    with _load(exported.bundle, exported, folder / "score-state") as model:
        right = labels_of(model.predict, part.images) == part.labels
        return Threshold(
            min_margin=margin_threshold(margins_of(model.predict, part.images), right, risk=RISK),
            text=(
                "The threshold is a plug-in estimate, which promises nothing for other images: "
                f"{exported.uncertified.removeprefix('offload: ')}."
            ),
        )


def _score(exported: Exported, stream: Part, outcome: Outcome, folder: Path) -> Scored:
    with (
        _load(exported.bundle, exported, folder / "device-state") as edge,
        _load(exported.cloud_bundle, exported, folder / "score-state") as cloud,
    ):
        served = edge.variant
        edge_right = labels_of(edge.predict, stream.images) == stream.labels
        cloud_right = labels_of(cloud.predict, stream.images) == stream.labels
    answers = outcome.answers
    hybrid = np.array([line.get("label", -1) for line in answers]) == stream.labels[[line["row"] for line in answers]]
    rows = [line["row"] for line in answers]
    down, up = outcome.endpoint_down
    during = [line for line in answers if down <= line["at_s"] < up]
    return Scored(
        served=served,
        edge=edge_right[rows],
        cloud=cloud_right[rows],
        hybrid=hybrid,
        outage={
            "requests": len(during),
            "answered": sum(line["source"] is not None for line in during),
            "late": sum(line.get("total_ms", np.inf) > DEADLINE_MS for line in during),
            "degraded": sum(line["source"] == "edge_degraded" for line in during),
            "recovered": any(line["source"] == "cloud" for line in answers if line["at_s"] >= up),
        },
        offloaded=float(np.mean([line["source"] == "cloud" for line in answers])),
    )


def _result(exported: Exported, scored: Scored, outcome: Outcome, *, trained: bool, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed + 4)
    answers = outcome.answers
    return {
        "trained": trained,
        "bundle": {
            "path": str(exported.bundle),
            "digest": exported.report["bundle"]["digest"],
            "size_bytes": exported.bundle.stat().st_size,
            "variants": [_variant(row) for row in exported.report["variants"]],
        },
        "served": scored.served,
        "offload": exported.report["offload"],
        "stages": exported.report["stages"],
        "baseline": exported.report["baseline"],
        "accuracy": {
            "edge": float(scored.edge.mean()),
            "cloud": float(scored.cloud.mean()),
            "hybrid": float(scored.hybrid.mean()),
            "hybrid_minus_edge_ci95": paired_interval(scored.hybrid, scored.edge, rng),
            "hybrid_minus_cloud_ci95": paired_interval(scored.hybrid, scored.cloud, rng),
        },
        "offloaded": scored.offloaded,
        "requests": {
            "sent": len(answers),
            "answered": sum(line["source"] is not None for line in answers),
            "late": sum(line.get("total_ms", np.inf) > DEADLINE_MS for line in answers),
            "deadline_ms": DEADLINE_MS,
        },
        "outage": scored.outage,
        "service": service_quality(answers),
        "telemetry": {
            **{name: outcome.account[name] for name in ("enqueued", "delivered", "pending", "dropped")},
            "received": outcome.consumer["received"],
        },
    }


def _variant(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": row["name"],
        "format": row["format"],
        "precision": row["precision"],
        "size_bytes": row["size_bytes"],
        "accuracy": row["metrics"]["accuracy"],
        "latency_ms_p50": row["latency_host_ms_p50"],
    }


def say_tables(result: dict[str, Any], say: Narrator) -> None:
    """The result as a person reads it."""
    variants = [
        [v["name"], f"{v['size_bytes'] / 1000:.1f}", f"{v['latency_ms_p50'] * 1000:.0f}", f"{v['accuracy']:.2%}"]
        for v in result["bundle"]["variants"]
    ]
    say.table("Variants (latency measured on this machine)", ["variant", "kB", "p50 us", "accuracy"], variants)
    scores = result["accuracy"]
    low, high = scores["hybrid_minus_edge_ci95"]
    rows = [[name, f"{scores[name]:.2%}"] for name in ("edge", "cloud", "hybrid")]
    rows.append(["hybrid - edge, 95 % interval", f"{100 * low:+.2f} to {100 * high:+.2f} points"])
    rows.append(["share asked of the cloud", f"{result['offloaded']:.1%}"])
    say.table("Accuracy on the stream", ["", "share right"], rows)
    requests, outage = result["requests"], result["outage"]
    say.table(
        f"Requests (deadline {requests['deadline_ms']:.0f} ms)",
        ["", "sent", "answered", "late", "edge_degraded"],
        [
            ["whole stream", str(requests["sent"]), str(requests["answered"]), str(requests["late"]), ""],
            [
                "endpoint stopped",
                str(outage["requests"]),
                str(outage["answered"]),
                str(outage["late"]),
                str(outage["degraded"]),
            ],
        ],
    )
    say.table("Service quality", SERVICE_COLUMNS, service_rows(result["service"]))
    account = result["telemetry"]
    say.table("Telemetry, in records", list(account), [[str(value) for value in account.values()]])
