"""10,000 fuzzed and forged commands at an agent's desk: no crash, no action. A share of them runs in tests/unit."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from outrider.agent.memory import read_taken
from support.commanding import Desk, a_command, forgeries, signed
from support.mutants import write_results

FULL = 10_000


@pytest.mark.trials
def test_no_forgery_of_ten_thousand_acts(tmp_path: Path) -> None:
    begun = time.monotonic()
    desk = Desk(tmp_path)
    desk.handle(signed(a_command("resume", sequence=4)))
    actions, record = list(desk.hands.actions), (tmp_path / "commands.json").read_bytes()
    outcomes: Counter[str] = Counter()
    for number, payload in enumerate(forgeries(FULL, seed=FULL)):
        said = desk.handle(payload)
        outcomes["not answered" if said is None else f"{said.result}: {said.reason}"] += 1
        assert desk.hands.actions == actions, (number, payload)
    assert (tmp_path / "commands.json").read_bytes() == record
    assert not any(outcome.startswith("ok") for outcome in outcomes), outcomes
    said = desk.handle(signed(a_command("pause", sequence=5)))
    assert said is not None and said.result == "ok"
    assert [each.sequence for each in read_taken(tmp_path)] == [4, 5]
    write_results(
        "forged-commands",
        {
            "commands": FULL,
            "actions": 0,
            "outcomes": dict(sorted(outcomes.items())),
            "taken_s": round(time.monotonic() - begun, 1),
        },
    )
