"""Whose bundles are installed and loaded: keys, revoked keys, and none."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider.bundle import generate_key, save_keypair
from outrider.installer import install
from outrider.model import Model, load
from outrider_runtimes.errors import (
    TrustError,
)
from support.realbundles import images, make_real_bundle


def test_trust_is_asked_at_install_and_at_load(tmp_path: Path) -> None:
    key, stranger = generate_key(), generate_key()
    _, public = save_keypair(tmp_path, "ours", key)
    _, other = save_keypair(tmp_path, "other", stranger)
    make_real_bundle(tmp_path / "b.outrider", signing_keys=[key])
    state = tmp_path / "state"
    with pytest.raises(TrustError):
        install(tmp_path / "b.outrider", trust=other, state=state)
    assert install(tmp_path / "b.outrider", trust=public, state=state).verified
    with load("tiny", trust=public, state=state) as model:
        assert model.bundle.verified
        assert model.infer(images()).verified
    with pytest.raises(TrustError):
        load("tiny", trust=other, state=state)
    with pytest.raises(TrustError):
        load(tmp_path / "b.outrider", trust=other, state=state)


def test_a_key_that_is_revoked_after_the_install_stops_the_next_load(tmp_path: Path) -> None:
    state = tmp_path / "state"
    key, second = generate_key(), generate_key()
    _, public = save_keypair(state / "trust", "ours", key)
    save_keypair(state / "trust", "second", second)
    make_real_bundle(tmp_path / "b.outrider", signing_keys=[key])
    assert install(tmp_path / "b.outrider", state=state).verified
    load("tiny", state=state).close()
    (state / "trust" / "revoked").mkdir()
    public.rename(state / "trust" / "revoked" / public.name)
    with pytest.raises(TrustError, match="revoked"):
        load("tiny", state=state)


def test_an_unsigned_bundle_says_so(model: Model) -> None:
    assert model.infer(images()).verified is False
