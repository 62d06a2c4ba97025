"""Nothing can change in a bundle without being seen: every bit, every length."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from outrider.bundle import Bundle, Trust, open_bundle, public_bytes, thin_bundle, verify_bundle
from outrider_runtimes.errors import BundleError
from support.bundles import make_bundle
from support.effort import effort, some
from support.keys import private_key

TRUST = Trust(keys=frozenset([public_bytes(private_key(1))]))


@pytest.fixture(scope="module", params=["signed twice", "unsigned", "thin"])
def sound(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flips")
    keys = [] if request.param == "unsigned" else [private_key(1), private_key(2)]
    path = make_bundle(folder, keys=keys)
    if request.param == "thin":
        thin_bundle(path, path, variants=["tflite-int8"])
    verify_bundle(path)
    return path


def _member_ranges(path: Path) -> list[range]:
    with open_bundle(path) as bundle:
        return [range(s.offset, s.offset + s.size_bytes) for s in bundle._spans.values()]


def _survivors(path: Path, offsets, check) -> list[tuple[int, int]]:
    """The flips (offset, bit) that ``check`` lets pass."""
    passed = []
    with path.open("r+b", buffering=0) as file:
        for offset in offsets:
            file.seek(offset)
            original = file.read(1)[0]
            for bit in range(8):
                file.seek(offset)
                file.write(bytes([original ^ (1 << bit)]))
                try:
                    check(path)
                    passed.append((offset, bit))
                except BundleError as error:
                    assert str(path) in str(error)
            file.seek(offset)
            file.write(bytes([original]))
    return passed


def _inspect(path: Path) -> None:
    open_bundle(path).close()


def test_every_flipped_bit_outside_the_members_is_refused_by_opening(sound):
    inside = {offset for span in _member_ranges(sound) for offset in span}
    outside = [offset for offset in range(sound.stat().st_size) if offset not in inside]
    assert len(outside) > 1500
    assert _survivors(sound, some(outside), _inspect) == []
    verify_bundle(sound)


@pytest.mark.slow
def test_every_flipped_bit_in_a_member_is_refused_by_verify(sound):
    inside = [offset for span in _member_ranges(sound) for offset in span]
    assert len(inside) > 200
    assert _survivors(sound, inside, verify_bundle) == []
    verify_bundle(sound)


def test_every_flipped_bit_in_a_member_is_refused_where_it_is_read(sound):
    with open_bundle(sound) as bundle:
        spans = dict(bundle._spans)
    rng = random.Random(3)
    for path, span in spans.items():
        offsets = rng.sample(range(span.offset, span.offset + span.size_bytes), 5)

        def read(file: Path, path: str = path) -> None:
            with open_bundle(file) as bundle:
                bundle.read(path)

        assert _survivors(sound, offsets, read) == []


def test_every_cut_is_refused(sound, tmp_path):
    cut = tmp_path / "cut.outrider"
    cut.write_bytes(sound.read_bytes())
    for length in some(range(sound.stat().st_size)[::-1]):
        os.truncate(cut, length)
        with pytest.raises(BundleError):
            open_bundle(cut)


@pytest.mark.parametrize("tail", [b"\0", b"\1", bytes(63), bytes(64), bytes(96), b"\n", b"\x89OUTRDR\n"])
def test_appended_bytes_are_refused(sound, tmp_path, tail):
    longer = tmp_path / "longer.outrider"
    longer.write_bytes(sound.read_bytes() + tail)
    with pytest.raises(BundleError):
        open_bundle(longer)


def test_a_byte_less_or_more_anywhere_is_refused(sound, tmp_path):
    data = sound.read_bytes()
    changed = tmp_path / "changed.outrider"
    rng = random.Random(4)
    for offset in rng.sample(range(len(data)), effort(100)):
        for version in (data[:offset] + data[offset + 1 :], data[:offset] + b"\0" + data[offset:]):
            changed.write_bytes(version)
            with pytest.raises(BundleError):
                open_bundle(changed)


def test_random_damage_of_several_bytes_is_refused_by_verify(sound, tmp_path):
    data = sound.read_bytes()
    changed = tmp_path / "changed.outrider"
    rng = random.Random(5)
    for _ in range(effort(400)):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 40)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        if broken == data:
            continue
        changed.write_bytes(broken)
        with pytest.raises(BundleError):
            verify_bundle(changed)


def test_an_error_leaves_no_file_open(sound, tmp_path):
    def opened() -> list[Path]:
        """Of this test's files: other tests' threads open theirs."""
        links = [Path(entry.path).resolve() for entry in os.scandir("/proc/self/fd")]
        return [link for link in links if link == sound or link.is_relative_to(tmp_path)]

    broken = tmp_path / "broken.outrider"
    broken.write_bytes(sound.read_bytes()[:-1])
    for _ in range(20):
        with pytest.raises(BundleError):
            open_bundle(broken)
    assert opened() == []
    bundle = open_bundle(sound)
    assert isinstance(bundle, Bundle)
    bundle.close()
    bundle.close()
    assert opened() == []


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "empty", "loop"])
def test_what_is_no_regular_file_is_a_typed_error(tmp_path, kind):
    path = tmp_path / "odd.outrider"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind == "loop":
        path.symlink_to(path)
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_a_signature_of_another_bundle_does_not_pass(tmp_path):
    one = make_bundle(tmp_path, seed=1, keys=[private_key(1)])
    two = make_bundle(tmp_path, seed=2, keys=[private_key(1)])
    from support.bundles import split

    first, second = split(one), split(two)
    assert first["prefix"] == second["prefix"]
    data = bytearray(one.read_bytes())
    data[first["prefix"] - 96 : first["prefix"]] = second["records"]
    one.write_bytes(data)
    with pytest.raises(BundleError, match="signature 0"):
        open_bundle(one, TRUST)
