"""How the pages show each result, as Markdown; see ``readme.SECTIONS``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.promise import missed_lines, verdict

Result = Mapping[str, Any]
ALIKE = "raw row, the spool's settings"


def coldstart(result: Result) -> str:
    """``results/coldstart.json`` as Markdown."""
    lines = [
        "From the start of a process to its first answer, beside importing the engine, loading the file and running",
        f"it; median of {result['rounds']} starts. `import outrider` takes "
        f"{result['import']['beyond_numpy_ms']['value']:.1f} ms beyond numpy,",
        f"and with `outrider.load` {result['import']['with_load_ms']['value']:.1f} ms.",
        "",
        "| engine's format | raw, ms | Outrider, ms | ratio | MB more |",
        "|---|---:|---:|---:|---:|",
    ]
    missed = []
    for name, found in result["first_answer"].items():
        p50, share = found["p50_ms"], found["ratio"]
        asked = f"- missed, start with {name}: {share['value']:.2f} of raw, {found['allowed_ratio']} was asked"
        missed += [asked] if share["value"] > found["allowed_ratio"] else []
        interval = f"{share['value']:.2f} ({share['low']:.2f} to {share['high']:.2f})"
        cells = [f"{p50['raw']:.0f}", f"{p50['outrider']:.0f}", interval, f"{found['more_mb']['value']:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |{verdict(found)}")
    return "\n".join([*lines, *([""] if missed else []), *missed])


def idle(result: Result) -> str:
    """``results/idle.json`` as Markdown."""
    busy = result["cores_busy"]
    return (
        f"{result['calls_a_second']} calls a second with {result['threads']} threads keep {busy['outrider']:.3f} of a "
        f"processor busy, where ONNX Runtime's defaults keep {busy['raw']:.2f}."
    )


def grid(result: Result) -> str:
    """``results/grid.json`` as Markdown."""
    lines = [
        "What `outrider install` chose among variants, engines and threads, over the best of all when each is measured "
        "again:",
        "",
    ]
    for name, found in result["subjects"].items():
        share = found["ratio_to_best"]
        lines.append(f"- {name}: {found['chosen']}, {share['value']:.2f} of {found['best']}'s time{verdict(found)}")
    return "\n".join(lines)


def cascade(result: Result) -> str:
    """``results/cascade.json`` as Markdown."""
    right, rows = result["accuracy"], result["rows"]["test"]
    low, high = result["hybrid_minus_cloud_points_interval"]
    lines = [
        f"A board with a threshold certified at alpha {result['alpha']:.0%}, delta {result['delta']:.0%}, on {rows:,}",
        f"drawn glyphs: right are {right['edge']:.2%} of the board's answers, {right['cloud']:.2%} of the cloud's and",
        f"{right['hybrid']:.2%} of both together, with {result['offloaded']:.1%} offloaded. That is",
        f"{result['hybrid_minus_cloud_points']:+.2f} points beside the cloud ({low:+.2f} to {high:+.2f}, paired 95 %).",
    ]
    return "\n".join([*lines, *missed_lines(result["promises"])])


def risk(result: Result) -> str:
    """``results/risk.json`` as Markdown."""
    lines = [
        f"Thresholds from {result['certification_rows']:,} rows that are to keep the risk under {result['alpha']:.0%},",
        f"certified ones with probability {1.0 - result['delta']:.0%}; each of {result['splits']} splits judged on all "
        "other rows:",
        "",
        "| threshold | risk too high in | refused in | mean risk | kept |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in result["thresholds"].items():
        kind = f"{name}, certified" if name in result["certified"] else name
        shares = f"{found['risk_mean']:.2%} | {found['kept_mean']:.0%}"
        lines.append(f"| {kind} | {found['violated']} | {found['refused']} | {shares} |")
    return "\n".join([*lines, *missed_lines(result["promises"])])


def overload(result: Result) -> str:
    """``results/overload.json`` as Markdown."""
    board, slow, http = result["board"], result["slow_endpoint"], result["http_bound_endpoint"]
    refusal_ms = slow["refused_p99_ms"]
    refusals = "nothing was refused" if refusal_ms is None else f"refusals took {refusal_ms:.0f} ms at p99"
    lines = [
        f"At three times what a board answers ({board['edge_per_s']:.0f}/s) it meets {_met(board['alone'])} of its",
        f"deadlines of {board['deadline_ms']:.0f} ms alone, and {_met(board['together'])} with the cloud; making the",
        f"load took {board['generator_share']:.1%} of its processor. At four times what an endpoint answers",
        f"({slow['alone_per_s']:.0f}/s) goodput was {slow['goodput']:.0%} of that, and {refusals}; at twice what one",
        f"bound by HTTP answers ({http['alone_per_s']:,.0f}/s), {http['goodput']:.0%}.",
    ]
    return "\n".join([*lines, *missed_lines(result["promises"])])


def overhead(result: Result) -> str:
    lines = [
        "What `Model.infer` adds to the raw engine, median, with all checks on:",
        "",
        "| engine | raw, us | `Model.infer`, us | with a `Reporter` watching, us |",
        "|---|---:|---:|---:|",
    ]
    for name, found in result["variants"].items():
        p50, added = found["p50_us"], found["added_us"]
        cells = [f"{p50[who]:.1f} (+{added[who]:.1f})" for who in ("Model.infer", "Model.infer, reporter watching")]
        lines.append(f"| {name} | {p50['raw']:.1f} | {' | '.join(cells)} |{verdict(found)}")
    return "\n".join(lines)


def variants(result: Result) -> str:
    found = result["latency"]
    lines = [
        f"{result['network']}: the variants of one bundle, one thread, one interleaved run.{verdict(found)}",
        "",
        "| variant | kB | p50, us | time over onnx-float32 (95 % interval) |",
        "|---|---:|---:|---:|",
    ]
    for name, size_bytes in result["size_bytes"].items():
        ratio = found["ratios"].get(name)
        share = "1" if ratio is None else f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        lines.append(f"| {name} | {size_bytes / 1000:.0f} | {found['p50_us'][name]:.0f} | {share} |")
    return "\n".join(lines)


def install(result: Result) -> str:
    lines = [
        f"What a device installs, with MQTT, for Python {result['python']}; no torch, no onnx, no compiler:",
        "",
        "| engine | MB unpacked | the largest |",
        "|---|---:|---|",
    ]
    for name, found in result["installs"].items():
        largest = sorted(found["packages_mb"].items(), key=lambda item: -item[1])[:3]
        beside = "; numpy is Debian's" if "numpy" in found["from_debian"] else ""
        lines.append(
            f"| {name} | {found['megabytes']:.0f} | {', '.join(f'{n} {mb:.0f}' for n, mb in largest)}{beside} |"
        )
    return "\n".join(lines)


def exporters(result: Result) -> str:
    lines = [
        "What the exporter chose for this machine, beside the best float32 file and the best of what the tools make by",
        "themselves (float32, three int8 forms by ONNX Runtime, one by AI Edge Quantizer), each given what it takes:",
        "",
        "| network | float32, kB | chosen, kB | float32, ms | chosen, ms | times as fast | time over the best peer's |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_chosen(subject) for subject in result["subjects"].values()]
    promised = [(subject, line) for subject in result["subjects"].values() for line in subject["promises"]]
    missed = [_missed(subject, line) for subject, line in promised if not line["met"]]
    met = f"Of {len(promised)} bounds on size, speed, accuracy and pruning {len(promised) - len(missed)} were met"
    noisy = sum(line["noisy"] for _, line in promised)
    met += f"; {noisy} were measured while the machine was too noisy" if noisy else ""
    picture = "![Time and size of every file, network by network](docs/images/exporters.png)"
    return "\n".join([*lines, "", f"{met}{':' if missed else '.'}", *missed, "", picture])


def client(result: Result) -> str:
    """Clients of one endpoint, as a table (``results/client.json``)."""
    shown = ("Remote.infer", "Remote.submit", "tritonclient", "urllib3, bytes alone")
    lines = [
        "One request at a time to `outrider serve` on this machine, median, us, in one interleaved run; urllib3 is",
        "given a body made beforehand and decodes nothing:",
        "",
        f"| request | {' | '.join(f'`{name}`' if name.startswith('Remote') else name for name in shown)} |",
        "|---|" + "---:|" * len(shown),
    ]
    for name, case in result["cases"].items():
        cells = [f"{case['p50_us'][who]:.0f}" if who in case["p50_us"] else "" for who in shown]
        lines.append(f"| {name} | {' | '.join(cells)} |{verdict(case)}")
    return "\n".join([*lines, *missed_lines(result["promises"])])


def telemetry(result: Result) -> str:
    """What telemetry costs, as a table (``results/telemetry.json``)."""
    lines = [
        "What telemetry costs here, beside what was asked of it:",
        "",
        "| | measured | asked |",
        "|---|---:|---:|",
        *(f"| {each['promise']} | {each['measured']:.2f} | {each['asked']:g} |" for each in result["promises"]),
        "",
    ]
    written, drain = result["bytes_written_a_record"], result["drain"]["records_a_second"]
    rows = result["append"]["ratios"]
    noisy = [name for name in ("path", "append", "drain", "stopped_broker", "start") if not result[name]["valid"]]
    lines += [
        f"Bytes written for a record of {written['record']:.0f}: {written['one a commit']:,.0f} alone, "
        f"{written['groups of 64']:,.0f} in groups of 64. A drain, records/s: {drain['ours']:,.0f} to the broker "
        f"(paho, one record a message, {drain['paho']:,.0f}), {drain['ours, to a consumer']:,.0f} to a consumer's "
        f"receipts (paho to a consumer {drain['paho, to a consumer']:,.0f}). Beside a raw row with all of the spool's "
        f"settings an append takes {rows['Spool.append']['value'] / rows[ALIKE]['value']:.2f} of its time.",
    ]
    lines[-1] += f" **INVALID**, the machine was too noisy: {', '.join(noisy)}." if noisy else ""
    return "\n".join([*lines, *missed_lines(result["promises"])])


def endpoint(result: Result) -> str:
    """Our endpoint beside MLServer, as tables (``results/endpoint.json``)."""
    shown = ("ours, JSON", "ours unbatched, JSON", "ours, binary")
    plain = ("a plain handler, JSON", "a plain handler, binary")
    beside = result["beside"]
    lines = [
        f"`outrider serve` beside MLServer {beside['small']['mlserver']} over the same `.onnx` file, requests/s",
        f"of {result['clients']} clients. A plain handler is written by hand on the same libraries and checks nothing:",
        "",
        f"| network | {' | '.join(shown)} | MLServer, JSON | times it, in that order | {', '.join(plain)}: times it |",
        "|---|" + "---:|" * (len(shown) + 3),
    ]
    for found in beside.values():
        rates, ratios = found["rate_per_s"], found["ratios"]
        cells = [f"{rates[name]:.0f}" for name in (*shown, found["base"])]
        cells += [", ".join(f"{ratios[name]['value']:.2f}" for name in names) for names in (shown, plain)]
        lines.append(f"| {found['network']} | {' | '.join(cells)} |{verdict(found)}")
    lines += [
        "",
        "The heavier the network's call, the less a server can add or save, but for batching.",
        "",
        "What batching gives over none, in binary:",
        "",
        "| network | batching | times the rate |",
        "|---|---|---:|",
    ]
    for name, gain in result["batching"].items():
        lines.append(f"| {name} | {gain['plan']} | {gain['ratio']['value']:.2f} |{verdict(gain)}")
    return "\n".join([*lines, *missed_lines(result["promises"])])


def ray_serve(result: Result) -> str:
    """Ours under Ray, as a table (``results/ray_serve.json``)."""
    lines = [
        "The same application under Ray Serve, one replica, beside a plain handler of Ray's, requests/s in JSON:",
        "",
        "| by | ours | plain handler | ratio |",
        "|---|---:|---:|---:|",
    ]
    for name, found in result["modes"].items():
        ours, plain = found["rate_per_s"]["ours, JSON"], found["rate_per_s"][found["base"]]
        lines.append(
            f"| {name} | {ours:.0f} | {plain:.0f} | {found['ratios']['ours, JSON']['value']:.2f} |{verdict(found)}"
        )
    return "\n".join([*lines, *missed_lines(result["promises"])])


def _chosen(subject: Result) -> str:
    files, times, chosen = subject["files"], subject["latency"]["p50_us"], subject["chosen"]
    plain = min((name for name in files if files[name]["float"]), key=lambda name: float(times[name]))
    pairs = subject["pairs"]
    own, peer = pairs[f"{chosen} over best fp32"], pairs["chosen over best peer"]
    smallest = min(file["size_bytes"] for file in files.values() if file["float"])
    sizes = [smallest / 1000, files[chosen]["size_bytes"] / 1000]
    cells = [
        subject["network"],
        *(f"{size:.0f}" for size in sizes),
        *(f"{times[name] / 1000:.3f}" for name in (plain, chosen)),
        f"{1 / own['value']:.2f} ({1 / own['high']:.2f} to {1 / own['low']:.2f})",
        f"{peer['value']:.2f} ({peer['low']:.2f} to {peer['high']:.2f})",
    ]
    return f"| {' | '.join(cells)} |{verdict(subject['latency'])}"


def _missed(subject: Result, line: Result) -> str:
    return (
        f"- missed, {subject['network'].partition(',')[0]}, {line['file']}: {line['promise']}: {line['measured']:.3f}, "
        f"{line['asked']:g} was asked ({line['note']})"
    )


def _met(rounds: Sequence[Result]) -> str:
    return " and ".join(f"{each['good'] / each['asked']:.1%}" for each in rounds)
