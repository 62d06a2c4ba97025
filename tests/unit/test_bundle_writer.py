"""What is written is what was given, the same each time, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.bundle import Variant, load_golden, open_bundle, thin_bundle, verify_bundle, write_bundle
from outrider.bundle.files import atomic_file
from outrider_runtimes.errors import BundleError, FormatError, IntegrityError
from support.bundles import INTERFACE, VARIANTS, binding, golden, golden_members, make_bundle, model_members
from support.effort import effort
from support.keys import private_key


def variants(names=VARIANTS) -> list[Variant]:
    return [Variant(name=n, format="onnx", precision="float32", member=f"models/{n}", binding=binding()) for n in names]


def write(path: Path, **changes) -> str:
    members = {f"models/{name}": b"model " + name.encode() for name in VARIANTS} | golden_members()
    arguments = {
        "name": "tiny",
        "version": 3,
        "interface": INTERFACE,
        "variants": variants(),
        "golden": golden(),
        "members": members,
        "provenance": {"tool": "test", "losses": [0.5, 0.25]},
    }
    return write_bundle(path, **(arguments | changes))


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "a.outrider"
    digest = write(path)
    with open_bundle(path) as bundle:
        manifest = bundle.manifest
        assert (manifest.name, manifest.version, manifest.digest) == ("tiny", 3, digest)
        assert manifest.interface == INTERFACE
        assert manifest.variants == tuple(variants())
        assert manifest.golden == golden()
        assert manifest.provenance == {"tool": "test", "losses": [0.5, 0.25]}
        assert bundle.read("models/onnx-float32") == b"model onnx-float32"
        assert digest == hashlib.sha256(manifest.raw).hexdigest()


def test_the_same_parts_give_the_same_bytes(tmp_path):
    """In any order of the mappings, from bytes or from files."""
    one, two = tmp_path / "1.outrider", tmp_path / "2.outrider"
    members = {f"models/{name}": b"model " + name.encode() for name in VARIANTS} | golden_members()
    files = {}
    for index, (path, content) in enumerate(reversed(members.items())):
        files[path] = tmp_path / f"part{index}"
        files[path].write_bytes(content)
    assert write(one, signing_keys=[private_key(1)]) == write(two, members=files, signing_keys=[private_key(1)])
    assert one.read_bytes() == two.read_bytes()


def test_the_bytes_of_version_1_do_not_change(tmp_path):
    """Fails when the format, the signed message or the spelling of the manifest changes: that needs a version 2."""
    data = make_bundle(tmp_path, keys=[private_key(1)]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == "bd7afc1873b4e43b52c8407b5a1067f4733880f89cc17a8de855c80c3e250a47"


@settings(max_examples=effort(60), deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=8), st.data())
def test_members_of_any_size_come_back(tmp_path_factory, contents, data):
    path = tmp_path_factory.mktemp("sizes") / "a.outrider"
    names = [f"v{index}" for index in range(len(contents))]
    members = {f"models/{name}": content for name, content in zip(names, contents, strict=True)}
    write(path, variants=variants(names), golden=golden(names), members=members | golden_members(names))
    kept = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    thin_bundle(path, path, variants=kept)
    verify_bundle(path)
    with open_bundle(path) as bundle:
        assert all(bundle.read(f"models/{name}") == members[f"models/{name}"] for name in kept)
        assert len(bundle.present & set(members)) == len(kept)


def test_golden_arrays_have_the_interfaces_dtype_and_order(tmp_path):
    path = tmp_path / "a.outrider"
    write(path)
    with open_bundle(path) as bundle:
        arrays = load_golden(bundle.read, bundle.manifest)
    image = arrays.inputs["image"]
    assert (image.dtype, image.shape) == (np.dtype("float32"), (2, 2, 2))
    assert image.dtype.isnative
    assert image.astype("<f4").tobytes() == golden_members()["golden/inputs/image.bin"]
    assert not image.flags.writeable
    assert set(arrays.variants) == set(VARIANTS)
    np.testing.assert_array_equal(arrays.variants["onnx-float32"]["logits"], arrays.reference["logits"])


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"name": "Not A Name"}, FormatError, "name"),
        ({"version": 0}, FormatError, "version"),
        ({"variants": []}, FormatError, "variants"),
        ({"provenance": {"loss": float("nan")}}, FormatError, "JSON"),
        ({"provenance": {"path": Path("x")}}, FormatError, "JSON"),
        ({"members": {}}, FormatError, "members"),
        ({"members": golden_members()}, FormatError, "used but not listed"),
        ({"members": golden_members() | {"../up": b"x"}}, FormatError, "not allowed"),
        ({"members": golden_members() | {f"models/{n}": b"" for n in VARIANTS}}, FormatError, "size: 0"),
        (
            {"members": golden_members() | {f"models/{n}": b"x" for n in VARIANTS} | {"stray": b"x"}},
            FormatError,
            "belongs to no variant",
        ),
        (
            {"members": golden_members() | {f"models/{n}": Path("not/there") for n in VARIANTS}},
            BundleError,
            "not/there",
        ),
        ({"signing_keys": [private_key(1), private_key(1)]}, FormatError, "signed twice"),
    ],
)
def test_what_breaks_a_rule_is_not_written(tmp_path, changes, kind, message):
    path = tmp_path / "a.outrider"
    path.write_bytes(b"what was there before")
    with pytest.raises(kind, match=message):
        write(path, **changes)
    assert [file.name for file in tmp_path.iterdir()] == ["a.outrider"]
    assert path.read_bytes() == b"what was there before"


def test_a_source_that_changes_while_it_is_written(tmp_path):
    """It is read twice, for the manifest and for the file; this one of the kernel's is another each time."""
    source = Path("/proc/sys/kernel/random/uuid")
    members = {f"models/{name}": b"x" for name in VARIANTS} | golden_members()
    with pytest.raises(IntegrityError, match="changed while") as caught:
        write(tmp_path / "a.outrider", members=members | {"models/onnx-float32": source})
    assert str(source) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_a_folder_that_cannot_be_written(tmp_path, parent):
    (tmp_path / "file").touch()
    path = tmp_path / parent / "a.outrider"
    with pytest.raises(BundleError, match="cannot be written") as caught:
        write(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands for the disk; the system's error is of the same kind."""
    path = make_bundle(tmp_path, filename="a.outrider")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        members = {f"models/{name}": bytes(1 << 20) for name in VARIANTS} | golden_members()
        with pytest.raises(BundleError, match="cannot be written"):
            write(path, members=members)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.outrider"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_the_umask_decides_who_may_read_a_bundle(tmp_path):
    old = os.umask(0o027)
    try:
        path = make_bundle(tmp_path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


def test_thinning_refuses_what_it_cannot_keep(tmp_path):
    whole, out = make_bundle(tmp_path), tmp_path / "thin.outrider"
    with pytest.raises(BundleError, match="no variant 'onnx-int4'"):
        thin_bundle(whole, out, variants=["onnx-int4"])
    with pytest.raises(BundleError, match="one variant at least"):
        thin_bundle(whole, out, variants=[])
    assert not out.exists()
    thin_bundle(whole, out, variants=["onnx-float32"])
    before = out.read_bytes()
    with pytest.raises(BundleError, match="thin bundle"):
        thin_bundle(out, out, variants=["tflite-int8"])
    assert out.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["thin.outrider", whole.name]


def test_model_members_are_what_make_bundle_packs(tmp_path):
    with open_bundle(make_bundle(tmp_path, seed=5)) as bundle:
        for path, content in model_members(seed=5).items():
            assert bundle.read(path) == content


def test_a_pipe_or_a_device_is_never_replaced_by_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not a regular file"), atomic_file(pipe) as file:
        file.write(b"content")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
