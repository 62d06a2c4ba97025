"""Header and layout; the page in docs/ that describes them; the reader against lying lengths."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.bundle import open_bundle, verify_bundle
from outrider.bundle.format import (
    ALIGNMENT,
    Header,
    layout,
    pack_header,
    unpack_header,
    unpack_presence,
)
from outrider.bundle.limits import MAX_MANIFEST_SIZE_BYTES, MAX_MEMBER_SIZE_BYTES, MAX_MEMBERS, MAX_SIGNATURES
from outrider_runtimes.errors import BundleError, FormatError, IntegrityError, UnsupportedBundle
from support.bundles import assemble, make_bundle, manifest_data, split
from support.keys import private_key
from support.peaks import peak_bytes

DOCS = Path(__file__).parents[2] / "docs" / "bundle-format.md"
EXAMPLE = Header(signature_count=1, manifest_size_bytes=1700, member_count=6, manifest_sha256=bytes(range(32)))


@given(
    st.integers(0, MAX_SIGNATURES),
    st.integers(2, MAX_MANIFEST_SIZE_BYTES),
    st.integers(1, MAX_MEMBERS),
    st.binary(min_size=32, max_size=32),
)
def test_header_comes_back(signatures, manifest_size, members, sha256):
    header = Header(
        signature_count=signatures, manifest_size_bytes=manifest_size, member_count=members, manifest_sha256=sha256
    )
    assert unpack_header(pack_header(header)) == header


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (12, MAX_SIGNATURES + 1),
        (12, 2**32 - 1),
        (16, 0),
        (16, MAX_MANIFEST_SIZE_BYTES + 1),
        (24, 0),
        (24, MAX_MEMBERS + 1),
        (28, 1),
    ],
)
def test_a_count_beyond_its_cap_is_refused(at, value):
    data = bytearray(pack_header(EXAMPLE))
    struct.pack_into("<I", data, at, value)
    with pytest.raises(FormatError, match="header"):
        unpack_header(bytes(data))


def test_another_format_version_is_unsupported_not_malformed():
    data = bytearray(pack_header(EXAMPLE))
    struct.pack_into("<I", data, 8, 2)
    with pytest.raises(UnsupportedBundle, match=r"version 2.*version 1") as caught:
        unpack_header(bytes(data))
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("data", [b"", b"\x89OUTRDR\n", bytes(64), b"TFL3" * 16])
def test_what_is_no_bundle_is_called_so(data):
    with pytest.raises(FormatError, match="not an Outrider bundle"):
        unpack_header(data)


@given(st.binary(min_size=1, max_size=8))
def test_presence_bytes_are_zero_or_one(data):
    if set(data) <= {0, 1}:
        assert unpack_presence(data) == tuple(bool(value) for value in data)
    else:
        with pytest.raises(FormatError, match="presence byte"):
            unpack_presence(data)


@given(
    st.integers(65, 10_000),
    st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=12),
)
def test_layout_covers_every_byte_once(prefix, members):
    sizes, present = zip(*members, strict=True)
    plan = layout(prefix, sizes, present)
    runs = sorted([*filter(None, plan.members), *plan.padding], key=lambda span: span.offset)
    at = prefix
    for span in runs:
        assert span.offset == at
        at += span.size_bytes
    assert at == plan.end
    assert all(span.offset % ALIGNMENT == 0 for span in plan.members if span is not None)
    assert all(span.size_bytes < ALIGNMENT for span in plan.padding)


@given(
    st.integers(65, 10_000),
    st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=8),
    st.data(),
)
def test_another_presence_flag_or_signature_count_always_shows_in_the_size(prefix, members, data):
    """What makes a flipped flag refusable although nothing hashes it."""
    sizes, present = map(list, zip(*members, strict=True))
    plan = layout(prefix, sizes, present)
    index = data.draw(st.integers(0, len(members) - 1))
    flipped = [here ^ (position == index) for position, here in enumerate(present)]
    assert layout(prefix, sizes, flipped).end != plan.end
    if any(present):
        assert layout(prefix + 96, sizes, present).end != plan.end


def test_bundle_matches_the_specification_read_independently(tmp_path):
    path = make_bundle(tmp_path, keys=[private_key(1), private_key(2)])
    parts, data = split(path), path.read_bytes()
    at = parts["prefix"]
    with open_bundle(path) as bundle:
        assert parts["manifest"] == bundle.manifest.raw
        assert [parts["records"][i : i + 32] for i in (0, 96)] == [s.public_key for s in bundle.signatures]
        for member in bundle.manifest.members:
            start = at + -at % 64
            assert data[at:start] == bytes(start - at)
            at = start + member.size_bytes
            assert data[start:at] == bundle.read(member.path)
    assert at == len(data)


def test_docs_hexdump_is_what_the_code_writes():
    block = re.search(r"```hexdump\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert block, "docs/bundle-format.md has no hexdump block"
    shown = b"".join(
        bytes.fromhex(line.split("  ", 1)[1].split("|")[0].strip()) for line in block[1].strip().splitlines()
    )
    assert shown == pack_header(EXAMPLE)


@pytest.mark.parametrize(
    "cap", [MAX_MANIFEST_SIZE_BYTES, MAX_MEMBER_SIZE_BYTES, MAX_MEMBERS, MAX_SIGNATURES, ALIGNMENT]
)
def test_docs_state_the_caps(cap):
    assert f"{cap:,}" in DOCS.read_text()


def refused_in_bytes(path: Path) -> int:
    def refused() -> None:
        with pytest.raises(BundleError):
            open_bundle(path)

    return peak_bytes(refused)


@pytest.mark.parametrize(
    ("at", "layout_", "value"),
    [
        (12, "<I", MAX_SIGNATURES),
        (12, "<I", 2**32 - 1),
        (16, "<Q", MAX_MANIFEST_SIZE_BYTES),
        (16, "<Q", 2**64 - 1),
        (24, "<I", MAX_MEMBERS),
        (24, "<I", 2**32 - 1),
    ],
)
def test_lying_lengths_are_refused_before_memory_is_taken(tmp_path, at, layout_, value):
    path = make_bundle(tmp_path)
    open_bundle(path).close()
    data = bytearray(path.read_bytes())
    struct.pack_into(layout_, data, at, value)
    path.write_bytes(data)
    assert refused_in_bytes(path) < 256 << 10


def test_a_member_that_claims_two_gigabytes_takes_no_memory(tmp_path):
    good = make_bundle(tmp_path)
    data = manifest_data(good)
    for member in data["members"]:
        if member["path"].startswith("models/"):
            member["size"] = MAX_MEMBER_SIZE_BYTES
    path = assemble(tmp_path / "lie.outrider", data, [b"x"] * len(data["members"]))
    assert refused_in_bytes(path) < 1 << 20


def test_reading_a_large_member_by_pieces_stays_small(tmp_path):
    path = make_bundle(tmp_path, size_bytes=16 << 20)
    assert peak_bytes(lambda: verify_bundle(path)) < 4 << 20


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path):
    path = make_bundle(tmp_path)
    with open_bundle(path) as bundle:
        with path.open("r+b") as file:
            file.truncate(bundle.size_bytes - 10)
        with pytest.raises(BundleError, match="shorter"):
            bundle.read(bundle.manifest.members[-1].path)


def test_the_file_that_was_checked_is_the_file_that_is_read(tmp_path):
    """Another file put in its place after the check is never looked at."""
    path = make_bundle(tmp_path, seed=1, filename="a.outrider")
    other = make_bundle(tmp_path, seed=2, filename="b.outrider")
    with open_bundle(path) as bundle:
        wanted = bundle.read("models/onnx-float32.onnx")
        other.replace(path)
        assert bundle.read("models/onnx-float32.onnx") == wanted


def test_bytes_changed_after_the_check_are_refused_when_read(tmp_path):
    path = make_bundle(tmp_path)
    with open_bundle(path) as bundle:
        data = path.read_bytes()
        with path.open("r+b") as file:
            file.seek(len(data) - 1)
            file.write(bytes([data[-1] ^ 1]))
        with pytest.raises(IntegrityError, match="tflite-int8"):
            bundle.read(bundle.manifest.members[-1].path)
