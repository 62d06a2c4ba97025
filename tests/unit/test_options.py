"""What is passed to install, rollback and load and cannot be used is refused by name, before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import outrider
from outrider_runtimes.errors import ConfigError

STRANGE = [3, b"x", ["a"], True, {}, 0.5]


@pytest.mark.parametrize("given", [None, *STRANGE])
def test_a_bundle_that_is_no_name_and_no_path(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ConfigError, match=r"source is .*, expected the name"):
        outrider.load(given, state=tmp_path)
    with pytest.raises(ConfigError, match=r"path is .*, expected the path"):
        outrider.install(given, state=tmp_path)
    with pytest.raises(ConfigError, match=r"name is .*, expected that of"):
        outrider.rollback(given, state=tmp_path)


@pytest.mark.parametrize("given", STRANGE)
def test_a_state_a_trust_or_limits_of_another_kind(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ConfigError, match=r"state is .*, expected the path"):
        outrider.load("tiny", state=given)
    with pytest.raises(ConfigError, match=r"state is .*, expected the path"):
        outrider.install("tiny.outrider", state=given)
    with pytest.raises(ConfigError, match=r"trust is .*, expected a Trust"):
        outrider.load("tiny", state=tmp_path, trust=given)
    with pytest.raises(ConfigError, match=r"limits is .*, expected Limits"):
        outrider.install("tiny.outrider", state=tmp_path, limits=given)
