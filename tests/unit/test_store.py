"""Install, go back, share, sweep; and every way in which a directory can be in the way."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from outrider.bundle import Trust, check_trust, load_golden, open_bundle, public_bytes, thin_bundle
from outrider.store import Installed, Store, find_state_dir
from outrider_runtimes.errors import (
    BundleError,
    IntegrityError,
    NotInstalled,
    StateDirectoryError,
    StoreError,
    TrustError,
)
from support.bundles import INTERFACE, make_bundle, model_members
from support.keys import private_key

NO_TRUST = Trust()


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(find_state_dir(tmp_path / "state", {}))


def install(store: Store, path: Path, choice=None, trust: Trust = NO_TRUST) -> Installed:
    with store.add(path, trust) as staged:
        return store.activate(staged, choice or {})


def blobs(store: Store) -> set[str]:
    return {path.name for path in (store.root / "blobs" / "sha256").iterdir()}


def blobs_of(*bundles: Installed) -> set[str]:
    members = {b.manifest.member(path).sha256 for b in bundles for path in b.present}
    return members | {b.digest for b in bundles}


def leftovers(store: Store) -> list[str]:
    names = [path.name for path in (store.root / "names").iterdir() if path.suffix != ".json"]
    return names + [path.name for path in (store.root / "tmp").iterdir()]


# Installing.


def test_what_was_installed_is_there(store, tmp_path):
    path = make_bundle(tmp_path, keys=[private_key(1)])
    made = install(store, path, {"variant": "onnx-float32", "threads": 2})
    found = store.installed("tiny")
    assert found == made
    assert found.choice == {"variant": "onnx-float32", "threads": 2}
    assert (found.name, found.manifest.version, found.manifest.interface) == ("tiny", 1, INTERFACE)
    with open_bundle(path) as bundle:
        assert found.digest == bundle.manifest.digest
        assert found.signatures == bundle.signatures
        assert found.present == bundle.present
        for member in bundle.manifest.members:
            assert found.blob_path(member.path).read_bytes() == bundle.read(member.path) == found.read(member.path)
    assert store.names() == ("tiny",)
    assert store.find_digest(found.digest) == found
    assert store.find_digest("0" * 64) is None
    assert leftovers(store) == []


def test_golden_arrays_come_from_the_store_too(store, tmp_path):
    found = install(store, make_bundle(tmp_path))
    assert load_golden(found.read, found.manifest).inputs["image"].shape == (2, 2, 2)


def test_nothing_counts_before_it_is_activated(store, tmp_path):
    with store.add(make_bundle(tmp_path), NO_TRUST) as staged:
        assert staged.bundle.read("models/onnx-float32.onnx") == model_members()["models/onnx-float32.onnx"]
        assert store.names() == ()
        with pytest.raises(NotInstalled):
            store.installed("tiny")
    assert not staged.open
    assert blobs(store) == set()
    assert leftovers(store) == []


def test_a_closed_one_is_not_activated(store, tmp_path):
    staged = store.add(make_bundle(tmp_path), NO_TRUST)
    staged.close()
    staged.close()
    with pytest.raises(StoreError, match="closed"):
        store.activate(staged, {})
    assert store.names() == ()


def test_an_unstorable_choice_changes_nothing(store, tmp_path):
    for choice in ({"latency": float("nan")}, {"path": Path("x")}):
        with store.add(make_bundle(tmp_path), NO_TRUST) as staged, pytest.raises(StoreError, match="choice"):
            store.activate(staged, choice)
    assert store.names() == ()
    assert leftovers(store) == []


def test_several_names_stand_beside_each_other(store, tmp_path):
    one, two = install(store, make_bundle(tmp_path, name="one")), install(store, make_bundle(tmp_path, name="two.json"))
    assert store.names() == ("one", "two.json")
    assert blobs(store) == blobs_of(one, two)
    assert len(blobs(store)) < len(blobs_of(one)) + len(blobs_of(two)), "equal members are stored once"


def test_an_untrusted_or_damaged_bundle_never_reaches_the_store(store, tmp_path):
    path = make_bundle(tmp_path, keys=[private_key(1)])
    with pytest.raises(TrustError):
        store.add(path, Trust(keys=frozenset([public_bytes(private_key(2))])))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="tflite-int8"):
        store.add(path, NO_TRUST)
    with pytest.raises(BundleError):
        store.add(tmp_path / "missing.outrider", NO_TRUST)
    assert blobs(store) == set()
    assert leftovers(store) == []


def test_who_signed_is_known_without_the_bundle(store, tmp_path):
    key, other = private_key(1), private_key(2)
    trust = Trust(keys=frozenset([public_bytes(key)]))
    path = make_bundle(tmp_path, keys=[key])
    assert install(store, path).verified is False
    assert install(store, path, trust=trust).verified is True
    path.unlink()
    found = store.installed("tiny")
    assert found.verified is True
    assert [signature.public_key for signature in found.signatures] == [public_bytes(key)]
    assert check_trust(found.name, found.signatures, trust) is True
    with pytest.raises(TrustError):
        check_trust(found.name, found.signatures, Trust(keys=frozenset([public_bytes(other)])))


# Versions.


def test_the_earlier_one_is_kept_and_the_one_before_it_is_not(store, tmp_path):
    one, two, three = (install(store, make_bundle(tmp_path, version=v, seed=v)) for v in (1, 2, 3))
    assert store.installed("tiny") == three
    assert blobs(store) == blobs_of(two, three)
    assert one.digest not in blobs(store)
    assert store.rollback("tiny") == two
    assert store.installed("tiny") == two
    assert blobs(store) == blobs_of(two)
    assert leftovers(store) == []


def test_rollback_goes_one_step_and_says_when_there_is_none(store, tmp_path):
    with pytest.raises(NotInstalled, match="'tiny'"):
        store.rollback("tiny")
    install(store, make_bundle(tmp_path, version=1, seed=1))
    with pytest.raises(NotInstalled, match="no earlier"):
        store.rollback("tiny")
    install(store, make_bundle(tmp_path, version=2, seed=2), {"variant": "b"})
    assert store.rollback("tiny").manifest.version == 1
    with pytest.raises(NotInstalled, match="no earlier") as caught:
        store.rollback("tiny")
    assert caught.value.hint
    assert install(store, make_bundle(tmp_path, version=2, seed=2)).manifest.version == 2


def test_an_older_version_is_refused_before_and_after_it_was_staged(store, tmp_path):
    old, new = make_bundle(tmp_path, version=1, seed=1), make_bundle(tmp_path, version=2, seed=2)
    with store.add(old, NO_TRUST) as staged:
        install(store, new)
        with pytest.raises(StoreError, match="version 1 is older than version 2"):
            store.activate(staged, {})
    with pytest.raises(StoreError, match="older") as caught:
        store.add(old, NO_TRUST)
    assert "rollback" in caught.value.hint
    assert store.installed("tiny").manifest.version == 2


def test_another_build_of_the_same_version_replaces_it(store, tmp_path):
    one = install(store, make_bundle(tmp_path, seed=1))
    two = install(store, make_bundle(tmp_path, seed=2))
    assert one.digest != two.digest
    assert store.rollback("tiny") == one


def test_the_same_bundle_again_keeps_the_way_back(store, tmp_path):
    one = install(store, make_bundle(tmp_path, version=1, seed=1))
    two = make_bundle(tmp_path, version=2, seed=2)
    install(store, two, {"threads": 1})
    install(store, two, {"threads": 4})
    assert store.installed("tiny").choice == {"threads": 4}
    assert store.rollback("tiny") == one


def test_thin_bundles_of_one_bundle_add_up(store, tmp_path):
    whole, thin = make_bundle(tmp_path), tmp_path / "thin.outrider"
    thin_bundle(whole, thin, variants=["onnx-float32"])
    first = install(store, thin)
    assert "models/tflite-int8.tflite" not in first.present
    with pytest.raises(BundleError, match="not installed"):
        first.blob_path("models/tflite-int8.tflite")
    thin_bundle(whole, thin, variants=["tflite-int8"])
    both = install(store, thin)
    assert {"models/onnx-float32.onnx", "models/tflite-int8.tflite"} <= both.present
    assert store.installed("tiny") == both
    both.blob_path("models/onnx-float32.onnx").write_bytes(b"damaged")
    again = install(store, thin)
    assert "models/onnx-float32.onnx" not in again.present, "what is damaged is not carried over"
    assert store.installed("tiny") == again


# Sharing.


def test_a_sweep_leaves_what_another_is_about_to_activate(store, tmp_path):
    with store.add(make_bundle(tmp_path, name="slow", seed=9), NO_TRUST) as slow:
        install(store, make_bundle(tmp_path, version=1, seed=1))
        install(store, make_bundle(tmp_path, version=2, seed=2))
        Store(store.root).sweep()
        store.activate(slow, {})
    assert store.installed("slow").read("models/onnx-float32.onnx")


def test_what_a_dead_process_left_is_swept(store, tmp_path):
    install(store, make_bundle(tmp_path))
    (store.root / "tmp" / "dead").mkdir()
    (store.root / "tmp" / "dead" / "held").write_text("0" * 64)
    (store.root / "tmp" / "dead" / ("0" * 64)).write_text("half")
    (store.root / "tmp" / "empty").mkdir()
    (store.root / "names" / ".tiny.json.abc.tmp").write_text("half")
    (store.root / "blobs" / "sha256" / ("0" * 64)).write_text("nobody's")
    store.sweep()
    assert leftovers(store) == []
    assert blobs(store) == blobs_of(store.installed("tiny"))


def test_what_cannot_be_swept_is_told_and_keeps_nothing_else(store, tmp_path, caplog):
    install(store, make_bundle(tmp_path))
    folder = store.root / "blobs" / "sha256"
    strays = [folder / (digit * 64) for digit in "0123456789"]
    for stray in strays:
        stray.write_text("nobody's")
    strays[5].unlink()
    (strays[5] / "in").mkdir(parents=True)  # not even root unlinks it
    store.sweep()
    assert [stray for stray in strays if stray.exists()] == [strays[5]]
    (said,) = caplog.messages
    assert str(store.root) in said and strays[5].name in said


def test_a_close_that_cannot_sweep_is_told_and_raises_nothing(store, tmp_path, caplog):
    staged = store.add(make_bundle(tmp_path), NO_TRUST)
    (store.root / "lock").unlink()
    (store.root / "lock").mkdir()
    staged.close()
    (said,) = caplog.messages
    assert str(store.root) in said


def test_a_store_that_never_held_anything_is_swept_in_silence(store, caplog):
    store.root.mkdir(exist_ok=True)
    store.sweep()
    assert caplog.messages == []


def test_threads_that_install_at_once_all_succeed(store, tmp_path):
    paths = [make_bundle(tmp_path, name=f"n{index % 4}", seed=index) for index in range(12)]
    errors: list[BaseException] = []

    def work(path: Path) -> None:
        try:
            found = install(store, path)
            for member in found.present:
                found.manifest.member(member)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(250)
    assert errors == []
    for name in store.names():
        found = store.installed(name)
        assert all(found.read(path) for path in found.present)
    assert store.names() == ("n0", "n1", "n2", "n3")
    assert leftovers(store) == []


# Damage.


def test_a_damaged_blob_is_found_and_healed_by_installing_again(store, tmp_path):
    path = make_bundle(tmp_path)
    found = install(store, path)
    blob = found.blob_path("models/onnx-float32.onnx")
    blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(StoreError, match="damaged"):
        found.read("models/onnx-float32.onnx")
    install(store, path)
    assert store.installed("tiny").read("models/onnx-float32.onnx") == model_members()["models/onnx-float32.onnx"]


@pytest.mark.parametrize("damage", ["missing", "cut", "manifest missing", "manifest changed", "record"])
def test_a_corrupt_store_is_a_typed_error_and_an_install_heals_it(store, tmp_path, damage):
    path = make_bundle(tmp_path)
    found = install(store, path)
    blob = found.blob_path("models/onnx-float32.onnx")
    manifest = store.root / "blobs" / "sha256" / found.digest
    if damage == "missing":
        blob.unlink()
    elif damage == "cut":
        os.truncate(blob, 3)
    elif damage == "manifest missing":
        manifest.unlink()
    elif damage == "manifest changed":
        manifest.write_bytes(manifest.read_bytes().replace(b"tiny", b"tinY"))
    else:
        (store.root / "names" / "tiny.json").write_text('{"format": 1, "current": ')
    with pytest.raises(StoreError) as caught:
        store.installed("tiny")
    assert "install" in caught.value.hint
    assert install(store, path).digest == found.digest
    assert store.installed("tiny").present == found.present


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("current"),
        lambda record: record.update(current=None),
        lambda record: record.update(current=[]),
        lambda record: record.update(format=2),
        lambda record: record.pop("last_good"),
        lambda record: record["current"].update(digest="../../../etc/passwd"),
        lambda record: record["current"].update(digest=7),
        lambda record: record["current"].update(blobs=["../names/tiny.json"]),
        lambda record: record["current"].update(signatures=["?"]),
        lambda record: record["current"].update(choice=3),
        lambda record: record["current"].update(present=["../../../etc/passwd"]),
        lambda record: record["current"].update(present=["not-a-member"]),
        lambda record: record["current"].update(version="x"),
    ],
)
def test_a_record_that_was_tampered_with_is_a_typed_error(store, tmp_path, change):
    path = make_bundle(tmp_path)
    install(store, path)
    file = store.root / "names" / "tiny.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    with pytest.raises(StoreError):
        store.installed("tiny")
    store.sweep()
    install(store, path)
    assert store.installed("tiny").manifest.version == 1


def test_an_unreadable_record_keeps_a_sweep_from_guessing(store, tmp_path):
    found = install(store, make_bundle(tmp_path, name="a"))
    install(store, make_bundle(tmp_path, name="b", seed=2))
    file = store.root / "names" / "a.json"
    record = file.read_bytes()
    file.write_bytes(b"damaged")
    install(store, make_bundle(tmp_path, name="c", seed=3))
    file.write_bytes(record)
    assert store.installed("a") == found


def test_rollback_works_while_the_current_one_is_damaged(store, tmp_path):
    one = install(store, make_bundle(tmp_path, version=1, seed=1))
    two = install(store, make_bundle(tmp_path, version=2, seed=2))
    two.blob_path("models/onnx-float32.onnx").unlink()
    assert store.rollback("tiny") == one


def test_rollback_to_what_is_damaged_changes_nothing(store, tmp_path):
    one = install(store, make_bundle(tmp_path, version=1, seed=1))
    two = install(store, make_bundle(tmp_path, version=2, seed=2))
    blob = one.blob_path("models/onnx-float32.onnx")
    blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(StoreError, match="damaged"):
        store.rollback("tiny")
    assert store.installed("tiny") == two


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "A", "x" * 300, "tiny\0", "unknown"])
def test_an_unknown_name_is_not_installed_whatever_it_looks_like(store, tmp_path, name):
    install(store, make_bundle(tmp_path))
    with pytest.raises(NotInstalled) as caught:
        store.installed(name)
    assert "tiny" in caught.value.hint


# The state directory.


def test_where_the_state_is(tmp_path):
    home = {"HOME": str(tmp_path / "home")}
    xdg = home | {"XDG_STATE_HOME": str(tmp_path / "xdg")}
    systemd = xdg | {"STATE_DIRECTORY": f"{tmp_path / 'one'}:{tmp_path / 'two'}"}
    assert find_state_dir(tmp_path / "given", systemd) == tmp_path / "given"
    assert find_state_dir(str(tmp_path / "given"), systemd) == tmp_path / "given"
    assert find_state_dir(None, systemd) == tmp_path / "one"
    assert find_state_dir(None, xdg) == tmp_path / "xdg" / "outrider"
    assert find_state_dir(None, home) == tmp_path / "home" / ".local" / "state" / "outrider"
    assert find_state_dir(None, home | {"XDG_STATE_HOME": "relative"}) == tmp_path / "home/.local/state/outrider"
    assert not (tmp_path / "two").exists()


def test_the_state_is_private(store, tmp_path):
    install(store, make_bundle(tmp_path))
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700
    assert stat.S_IMODE((store.root / "names" / "tiny.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/outrider", "/proc/1/outrider", "/dev/null/x"])
def test_a_state_directory_that_cannot_be_made(tmp_path, where):
    (tmp_path / "file").touch()
    path = tmp_path / where
    with pytest.raises(StateDirectoryError) as caught:
        find_state_dir(path, {})
    assert str(path) in str(caught.value)
    assert "STATE_DIRECTORY" in caught.value.hint


@pytest.mark.parametrize("name", ["blobs", "names", "tmp", "lock", "blobs/sha256"])
def test_something_else_in_the_place_of_a_folder_of_the_store(tmp_path, name):
    root = find_state_dir(tmp_path / "state", {})
    (root / name).parent.mkdir(exist_ok=True)
    if name == "lock":
        (root / name).mkdir()
    else:
        (root / name).touch()
    with pytest.raises(StoreError) as caught:
        install(Store(root), make_bundle(tmp_path))
    assert str(root) in str(caught.value)


def test_a_store_that_is_not_there_is_empty(tmp_path):
    store = Store(tmp_path / "nothing")
    assert store.names() == ()
    assert store.find_digest("0" * 64) is None
    for call in (store.installed, store.rollback):
        with pytest.raises(NotInstalled, match="nothing"):
            call("tiny")
    assert not store.root.exists()
