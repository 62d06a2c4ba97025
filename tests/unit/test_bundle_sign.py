"""Keys on disk, signatures in bundles, and which of them count."""

from __future__ import annotations

import base64
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from outrider.bundle import (
    Trust,
    check_trust,
    find_trust,
    generate_key,
    key_id,
    load_private_key,
    load_public_key,
    open_bundle,
    public_bytes,
    save_keypair,
    sign_bundle,
    thin_bundle,
    verify_bundle,
)
from outrider.bundle.sign import SIGNATURE_DOMAIN, signature_message
from outrider_runtimes.errors import BundleError, TrustError
from support.bundles import make_bundle, split
from support.keys import private_key

ALICE, BOB, EVE = private_key(1), private_key(2), private_key(3)


def trust_of(*keys, revoked=()) -> Trust:
    return Trust(
        keys=frozenset(public_bytes(key) for key in keys),
        revoked=frozenset(key_id(public_bytes(key)) for key in revoked),
    )


def write_public(folder: Path, name: str, key) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pub"
    path.write_text(base64.b64encode(public_bytes(key)).decode() + " a comment\n")
    return path


# Keys.


def test_a_saved_pair_loads_and_belongs_together(tmp_path):
    private, public = save_keypair(tmp_path / "new" / "keys", "ops")
    assert (private.name, public.name) == ("ops.key", "ops.pub")
    key = load_private_key(private)
    assert load_public_key(public) == public_bytes(key)
    assert key_id(public_bytes(key)) in public.read_text()
    assert stat.S_IMODE(private.stat().st_mode) == 0o600


def test_a_private_key_is_private_whatever_the_umask(tmp_path):
    old = os.umask(0)
    try:
        private, _ = save_keypair(tmp_path, "ops")
    finally:
        os.umask(old)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600


@pytest.mark.parametrize("there", ["ops.key", "ops.pub"])
def test_keys_are_never_overwritten(tmp_path, there):
    (tmp_path / there).write_text("precious")
    with pytest.raises(BundleError, match=f"{there} exists already"):
        save_keypair(tmp_path, "ops")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "precious"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/ops"])
def test_a_key_name_is_a_file_name(tmp_path, name):
    with pytest.raises(BundleError, match="not a file name"):
        save_keypair(tmp_path, name)


def test_a_key_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot be written"):
        save_keypair(tmp_path / "file", "ops")


def test_generated_keys_differ():
    assert public_bytes(generate_key()) != public_bytes(generate_key())


def _encrypted(path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s

    path.write_bytes(ALICE.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"x")))


def _other_kind(path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    key = X25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"hello"), "not an unencrypted private key"),
        (lambda path: path.write_bytes(b""), "not an unencrypted private key"),
        (lambda path: path.write_bytes(bytes(10_000)), "too long"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: None, "cannot be read"),
        (_encrypted, "not an unencrypted private key"),
        (_other_kind, "another kind of key"),
    ],
)
def test_what_is_no_private_key(tmp_path, make, message):
    path = tmp_path / "odd.key"
    make(path)
    with pytest.raises(BundleError, match=message) as caught:
        load_private_key(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint or "too long" in message


@pytest.mark.parametrize("text", ["", "\n", "AAAA", "not base64 at all!", "A" * 5000, "é" * 44])
def test_what_is_no_public_key(tmp_path, text):
    path = tmp_path / "odd.pub"
    path.write_text(text)
    with pytest.raises(TrustError, match=r"odd\.pub"):
        load_public_key(path)


def test_without_cryptography_unsigned_bundles_open_and_the_rest_says_what_to_install(tmp_path):
    unsigned, signed = make_bundle(tmp_path, name="plain"), make_bundle(tmp_path, name="signed", keys=[ALICE])
    code = """
import sys
sys.modules["cryptography"] = None
from outrider.bundle import generate_key, open_bundle
from outrider_runtimes.errors import BundleError
open_bundle(sys.argv[1]).close()
for call in (lambda: open_bundle(sys.argv[2]), generate_key):
    try:
        call()
    except BundleError as error:
        assert error.hint == "pip install cryptography", error.hint
    else:
        sys.exit("no error")
"""
    subprocess.run([sys.executable, "-c", code, unsigned, signed], check=True)


def test_cryptography_is_not_loaded_before_a_signature_is():
    code = """
import sys
import outrider.bundle, outrider.store
sys.exit(", ".join(name for name in ("cryptography", "sqlite3", "asyncio", "http") if name in sys.modules) or 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Signatures.


def test_signatures_are_over_the_documented_message(tmp_path):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    parts = split(make_bundle(tmp_path, keys=[ALICE]))
    record = parts["records"]
    message = b"outrider bundle signature, version 1\0" + parts["sha256"]
    assert len(message) == 69
    Ed25519PublicKey.from_public_bytes(record[:32]).verify(record[32:], message)
    assert signature_message(parts["sha256"]) == message
    assert len(SIGNATURE_DOMAIN) == 37


def test_signing_adds_a_record_and_changes_nothing_else(tmp_path):
    path = make_bundle(tmp_path, keys=[ALICE])
    before = verify_bundle(path)
    added = sign_bundle(path, BOB)
    after = verify_bundle(path, trust_of(BOB))
    assert after.verified
    assert after.manifest.raw == before.manifest.raw
    assert after.signatures == (*before.signatures, added)
    assert make_bundle(tmp_path, keys=[ALICE, BOB], filename="both.outrider").read_bytes() == path.read_bytes()


def test_signing_twice_with_one_key_changes_nothing(tmp_path):
    path = make_bundle(tmp_path, keys=[ALICE])
    before = path.read_bytes()
    assert sign_bundle(path, ALICE).key_id == key_id(public_bytes(ALICE))
    assert path.read_bytes() == before


def test_a_damaged_bundle_gets_no_signature(tmp_path):
    path = make_bundle(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="tflite-int8"):
        sign_bundle(path, ALICE)
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_no_more_signatures_than_the_format_has_room_for(tmp_path):
    path = make_bundle(tmp_path, keys=[private_key(number) for number in range(64)])
    assert len(verify_bundle(path).signatures) == 64
    with pytest.raises(BundleError, match="64 signatures"):
        sign_bundle(path, private_key(64))


def test_a_thin_bundle_is_signed_as_the_whole_one_was(tmp_path):
    whole = make_bundle(tmp_path, keys=[ALICE])
    thin = tmp_path / "thin.outrider"
    digest = thin_bundle(whole, thin, variants=["tflite-int8"])
    found = verify_bundle(thin, trust_of(ALICE))
    assert found.verified
    assert found.manifest.digest == digest == verify_bundle(whole).manifest.digest
    assert "models/onnx-float32.onnx" not in found.present
    assert thin.stat().st_size < whole.stat().st_size
    sign_bundle(thin, BOB)
    assert verify_bundle(thin, trust_of(BOB)).present == found.present


# Trust.


def test_no_keys_anywhere_loads_unverified(tmp_path):
    path = make_bundle(tmp_path, keys=[ALICE])
    assert verify_bundle(path, Trust()).verified is False
    assert verify_bundle(make_bundle(tmp_path, name="plain"), Trust()).verified is False


def test_any_of_several_keys_will_do(tmp_path):
    path = make_bundle(tmp_path, keys=[ALICE, BOB])
    for trust in (trust_of(ALICE), trust_of(BOB), trust_of(BOB, EVE), trust_of(BOB, revoked=[ALICE])):
        assert verify_bundle(path, trust).verified is True


def test_an_unsigned_bundle_where_a_key_is_required(tmp_path):
    path = make_bundle(tmp_path)
    with pytest.raises(TrustError, match="is not signed") as caught:
        open_bundle(path, trust_of(ALICE))
    assert key_id(public_bytes(ALICE)) in str(caught.value)
    assert str(path) in str(caught.value)
    assert "outrider sign" in caught.value.hint


def test_a_wrong_key_names_both_sides(tmp_path):
    path = make_bundle(tmp_path, keys=[EVE])
    with pytest.raises(TrustError, match=f"signed by {key_id(public_bytes(EVE))}") as caught:
        open_bundle(path, trust_of(ALICE, BOB))
    assert key_id(public_bytes(ALICE)) in str(caught.value)
    assert key_id(public_bytes(BOB)) in str(caught.value)
    assert ".pub" in caught.value.hint


def test_a_revoked_key_does_not_count_even_where_it_is_trusted(tmp_path):
    path = make_bundle(tmp_path, keys=[ALICE])
    with pytest.raises(TrustError, match=f"{key_id(public_bytes(ALICE))} is revoked") as caught:
        open_bundle(path, trust_of(ALICE, revoked=[ALICE]))
    assert caught.value.hint


def test_revocations_alone_still_require_a_signature(tmp_path):
    trust = trust_of(revoked=[ALICE])
    for keys in ([], [ALICE], [EVE]):
        with pytest.raises(TrustError):
            check_trust("it", verify_bundle(make_bundle(tmp_path, keys=keys)).signatures, trust)


def test_trust_is_checked_before_the_manifest_is_parsed(tmp_path):
    """A stranger's manifest, whatever it holds, is not looked at."""
    from support.bundles import assemble

    path = assemble(tmp_path / "odd.outrider", b"{ this is no JSON", [b"x"])
    with pytest.raises(TrustError, match="not signed"):
        open_bundle(path, trust_of(ALICE))


def test_a_folder_of_keys_with_revoked_ones(tmp_path):
    folder = tmp_path / "trust"
    write_public(folder, "alice", ALICE)
    write_public(folder, "bob", BOB)
    write_public(folder / "revoked", "bob-lost-his", BOB)
    (folder / "README").write_text("not a key")
    trust = Trust.load(folder)
    assert trust == Trust(
        keys=frozenset([public_bytes(ALICE), public_bytes(BOB)]),
        revoked=frozenset([key_id(public_bytes(BOB))]),
        origin=str(folder),
    )
    assert check_trust("it", verify_bundle(make_bundle(tmp_path, keys=[ALICE])).signatures, trust)
    with pytest.raises(TrustError, match="revoked"):
        check_trust("it", verify_bundle(make_bundle(tmp_path, keys=[BOB])).signatures, trust)


def test_argument_then_environment_then_state_directory(tmp_path):
    a, b, c = (write_public(tmp_path / name, name, key) for name, key in (("a", ALICE), ("b", BOB), ("c", EVE)))
    state = tmp_path / "state"
    write_public(state / "trust", "c", EVE)
    environ = {"OUTRIDER_TRUST": str(b)}
    assert find_trust(a, state, environ).keys == {public_bytes(ALICE)}
    assert find_trust(str(a.parent), state, environ).keys == {public_bytes(ALICE)}
    assert find_trust(trust_of(ALICE), state, environ) == trust_of(ALICE)
    assert find_trust(None, state, environ).keys == {public_bytes(BOB)}
    assert find_trust(None, state, {}).keys == {public_bytes(EVE)}
    assert find_trust(None, state, {"OUTRIDER_TRUST": ""}).keys == {public_bytes(EVE)}
    assert not find_trust(None, tmp_path / "elsewhere", {}).required
    assert not find_trust(None, None, {}).required
    assert c.exists()


def test_what_is_named_must_be_there_and_hold_a_key(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for named in (tmp_path / "missing", tmp_path / "missing.pub", empty):
        with pytest.raises(TrustError, match=str(named)):
            find_trust(named, None, {})
        with pytest.raises(TrustError, match=str(named)):
            find_trust(None, None, {"OUTRIDER_TRUST": str(named)})


@pytest.mark.parametrize("where", ["trust", "trust/revoked"])
def test_a_damaged_key_in_the_trust_folder_fails_closed(tmp_path, where):
    write_public(tmp_path / "trust", "alice", ALICE)
    (tmp_path / where).mkdir(exist_ok=True)
    (tmp_path / where / "broken.pub").write_text("AAAA")
    with pytest.raises(TrustError, match=r"broken\.pub"):
        find_trust(None, tmp_path, {})


def test_a_trust_folder_that_is_a_broken_link_fails_closed(tmp_path):
    (tmp_path / "trust").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TrustError):
        find_trust(None, tmp_path, {})


@pytest.mark.parametrize("name", ["two\nlines", "\udcff", "bell\a"])
def test_a_key_name_that_cannot_be_shown_is_refused_and_nothing_is_left(tmp_path, name):
    with pytest.raises(BundleError, match="not a file name"):
        save_keypair(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(120)
def test_a_key_file_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path):
    pipe = tmp_path / "ops.pub"
    os.mkfifo(pipe)
    for named in (pipe, tmp_path):
        with pytest.raises(TrustError, match="not a regular file"):
            Trust.load(named)
    with pytest.raises(BundleError, match="not a regular file"):
        load_private_key(pipe)


def test_a_path_with_a_null_byte_is_a_typed_error(tmp_path):
    with pytest.raises(TrustError, match=r"null (byte|character)"):
        Trust.load("a\0b.pub")
    with pytest.raises(BundleError, match=r"null (byte|character)"):
        open_bundle(tmp_path / "a\0b.outrider")


def test_signing_keeps_the_rights_of_the_file_and_follows_a_link(tmp_path):
    path = make_bundle(tmp_path)
    path.chmod(0o600)
    link = tmp_path / "link.outrider"
    link.symlink_to(path)
    sign_bundle(link, private_key(1))
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with open_bundle(path) as bundle:
        assert len(bundle.signatures) == 1
