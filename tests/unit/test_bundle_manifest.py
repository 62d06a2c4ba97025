"""The manifest's rules, one attack each, and a fuzzer that looks for what has no rule."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outrider.bundle import load_golden, open_bundle, parse_manifest
from outrider.bundle.limits import MAX_MANIFEST_SIZE_BYTES
from outrider_runtimes.errors import BundleError, FormatError, UnsupportedBundle
from support.bundles import assemble, make_bundle, manifest_data, split
from support.effort import effort
from support.peaks import peak_bytes


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Any]:
    return manifest_data(make_bundle(tmp_path_factory.mktemp("manifest")))


def encode(data: object) -> bytes:
    return json.dumps(data).encode()


def changed(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the value at ``a/b/0/c`` replaced; ``...`` removes it."""
    out = copy.deepcopy(data)
    *way, last = path.split("/")
    at: Any = out
    for step in way:
        at = at[int(step)] if isinstance(at, list) else at[step]
    key = int(last) if isinstance(at, list) else last
    if value is ...:
        del at[key]
    else:
        at[key] = value
    return out


def test_what_is_sound_parses_and_says_what_it_said(sound):
    manifest = parse_manifest(encode(sound))
    assert manifest.name == "tiny"
    assert [variant.to_dict() for variant in manifest.variants] == sound["variants"]
    assert manifest.golden.to_dict() == sound["golden"]
    assert [member.to_dict() for member in manifest.members] == sound["members"]
    assert manifest.interface.to_dict() == sound["interface"]
    assert manifest.variant("tflite-int8").precision == "int8"
    with pytest.raises(BundleError, match="no variant 'x'") as caught:
        manifest.variant("x")
    assert "onnx-float32" in caught.value.hint


def test_the_digest_is_the_sha256_of_the_bytes(sound):
    raw = encode(sound)
    assert parse_manifest(raw).digest == hashlib.sha256(raw).hexdigest()


def test_of_what_is_known_the_golden_is_looked_at_when_it_is_asked_for(sound):
    assert parse_manifest(encode(sound), known=True) == parse_manifest(encode(sound))
    broken = encode(changed(sound, "golden/rows", 0))
    with pytest.raises(FormatError, match="rows"):
        parse_manifest(broken)
    manifest = parse_manifest(broken, known=True)
    with pytest.raises(FormatError, match="rows"):
        _ = manifest.golden


def test_a_task_of_the_cloud_is_marked_and_without_a_mark_it_is_not_one(sound):
    assert parse_manifest(encode(sound)).cloud_only is False
    assert parse_manifest(encode({**sound, "cloud_only": True})).cloud_only is True
    assert parse_manifest(encode({**sound, "cloud_only": False})).cloud_only is False


def test_unknown_keys_are_kept_everywhere(sound):
    data = changed(sound, "schedule", {"curve": [1, 2.5]})
    data = changed(data, "interface/tuning", [{"in": "h"}])
    data = changed(data, "members/0/comment", "of a newer version")
    data = changed(data, "variants/0/made_by", ["x"])
    manifest = parse_manifest(encode(data))
    assert json.loads(manifest.raw) == data
    assert manifest.interface.extra == {"tuning": [{"in": "h"}]}


def test_an_unknown_key_survives_signing_and_thinning(tmp_path):
    from outrider.bundle import sign_bundle, thin_bundle
    from support.keys import private_key

    good = make_bundle(tmp_path)
    data = changed(manifest_data(good), "from_the_future", {"a": [1, None]})
    with open_bundle(good) as bundle:
        members = [bundle.read(member.path) for member in bundle.manifest.members]
    path = assemble(tmp_path / "future.outrider", json.dumps(data, indent=3).encode(), members)
    raw = split(path)["manifest"]
    sign_bundle(path, private_key(1))
    thin_bundle(path, tmp_path / "thin.outrider", variants=["onnx-float32"])
    assert split(tmp_path / "thin.outrider")["manifest"] == raw


@pytest.mark.parametrize("names", [["teleport"], ["x"] * 1000, [""]])
def test_unknown_requires_is_unsupported(sound, names):
    with pytest.raises(UnsupportedBundle, match="requires") as caught:
        parse_manifest(encode(changed(sound, "requires", names)))
    assert "upgrade" in caught.value.hint


def test_requires_is_looked_at_before_what_a_newer_version_may_have_changed(sound):
    data = changed(changed(sound, "requires", ["teleport"]), "variants", "another shape in version 2")
    with pytest.raises(UnsupportedBundle, match="teleport"):
        parse_manifest(encode(data))
    with pytest.raises(UnsupportedBundle, match="format 2"):
        parse_manifest(encode({"format": 2}))


def test_an_unknown_model_format_is_unsupported(sound):
    with pytest.raises(UnsupportedBundle, match="gguf"):
        parse_manifest(encode(changed(sound, "variants/0/format", "gguf")))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", ..., "format: is missing"),
        ("format", True, "format: expected an integer"),
        ("requires", ..., "requires: is missing"),
        ("requires", [1], "requires: expected strings"),
        ("name", "Tiny", "name: 'Tiny'"),
        ("name", "a/b", "name"),
        ("name", "tiny\n", "name"),
        ("name", "x" * 65, "name"),
        ("name", ".tiny", "name"),
        ("version", 0, "version: 0"),
        ("version", 1.0, "version: expected an integer, not float"),
        ("version", "1", "version: expected an integer, not str"),
        ("version", 2**53, "version"),
        ("interface", ..., "interface: is missing"),
        ("interface", [], "interface: expected an object"),
        ("interface/inputs", [], "interface"),
        ("interface/inputs", None, "interface"),
        ("interface/inputs/0/dtype", "complex64", "complex64"),
        ("interface/inputs/0/shape", [None, 2**31, 2], "shape"),
        ("interface/inputs/0/shape", {"a": 1}, "interface"),
        ("interface/inputs/0/axes", "HNW", "axis N"),
        ("interface/inputs/0/shape/0", 2, "fixes N to 2"),
        ("interface/outputs/0/range", [1], "interface"),
        ("variants", [], "variants: has 0 entries"),
        ("variants", {}, "variants: expected a list"),
        ("variants/0", 7, "expected an object"),
        ("variants/0/name", "tflite-int8", "'tflite-int8' stands twice"),
        ("variants/0/name", "../up", "variants\\[0\\].name"),
        ("variants/0/precision", 8, "precision"),
        ("variants/0/measured", [1], "measured"),
        ("variants/0/binding", ..., "binding"),
        ("variants/0/binding/inputs", [], "binding"),
        ("variants/0/binding/inputs/0/name", "other", "binding"),
        ("variants/0/binding/inputs/0/shape", [1], "binding"),
        ("variants/0/binding/inputs/0/scale", -1, "scale"),
        ("variants/0/binding/inputs/0/permutation", [0, 0, 1], "permutation"),
        ("variants/0/binding/inputs/0", [], "binding|malformed"),
        ("members/0/path", "golden/../../etc/passwd", "not allowed"),
        ("members/0/path", "/etc/passwd", "not allowed"),
        ("members/0/path", "a//b", "not allowed"),
        ("members/0/path", "a/", "not allowed"),
        ("members/0/path", "./a", "not allowed"),
        ("members/0/path", "A", "not allowed"),
        ("members/0/path", "a\\b", "not allowed"),
        ("members/0/path", "a\0b", "not allowed"),
        ("members/0/path", "a\n", "not allowed"),
        ("members/0/path", "é", "not allowed"),
        ("members/0/path", "", "not allowed"),
        ("members/0/path", "a" * 256, "not allowed"),
        ("members/0/path", ["a"], "expected a string"),
        ("members/0/size", 0, "size: 0"),
        ("members/0/size", 2**31 + 1, "size"),
        ("members/0/size", -1, "size: -1"),
        ("members/0/size", True, "size: expected an integer"),
        ("members/0/sha256", "A" * 64, "sha256"),
        ("members/0/sha256", "a" * 63, "sha256"),
        ("members/0", ..., "used but not listed"),
        ("members/0/path", "stray.bin", "used but not listed"),
        ("variants/0/member", "nowhere.onnx", "used but not listed"),
        ("variants/0/member", "models/tflite-int8.tflite", "stands twice"),
        ("variants/0/member", "golden/inputs/image.bin", "stands twice"),
        ("golden/variants/tflite-int8/logits/member", "golden/reference/logits.bin", "stands twice"),
        ("golden", ..., "golden: is missing"),
        ("golden/rows", 0, "rows: 0"),
        ("golden/rows", 65_537, "rows"),
        ("golden/rows", 3, "the interface and rows say"),
        ("golden/inputs", {}, "golden.inputs: 'image' is missing"),
        ("golden/inputs/stray", {}, "golden.inputs: 'stray' is not expected"),
        ("golden/inputs/image/shape", [2, 2, 3], "the interface and rows say"),
        ("golden/inputs/image/shape", [2, 4], "the interface and rows say"),
        ("golden/inputs/image/shape", [2, 2, -2], "sizes of 1 and more"),
        ("golden/inputs/image/shape", [2, 2, 0], "sizes of 1 and more"),
        ("golden/inputs/image/shape", [2, 2, True], "sizes of 1 and more"),
        ("golden/inputs/image/shape", [1] * 17, "17 entries"),
        ("golden/inputs/image/dtype", "float64", "dtype"),
        ("golden/inputs/image/dtype", "O", "dtype"),
        ("golden/variants/tflite-int8", ..., "golden.variants"),
        ("golden/tolerance/tflite-int8", ..., "golden.tolerance"),
        ("golden/tolerance/tflite-int8/logits", -0.1, "0 or more"),
        ("golden/tolerance/tflite-int8/logits", True, "0 or more"),
        ("golden/tolerance/tflite-int8/logits", None, "0 or more"),
        ("golden/decision", ..., "decision: is missing"),
        ("golden/decision/kind", "vibes", "vibes"),
        ("golden/decision/output", "other", "no output 'other'"),
        ("golden/decision/axis", 2, "axis"),
        ("golden/decision/axis", 0, "axis"),
        ("golden/decision/axis", -2, "axis"),
        ("golden/decision/min_agreement", 1.5, "min_agreement"),
        ("provenance", [], "provenance: expected an object"),
        ("cloud_only", 1, "cloud_only: expected true or false, not int"),
        ("cloud_only", None, "cloud_only: expected true or false, not null"),
    ],
)
def test_each_broken_rule_is_named(sound, path, value, message):
    with pytest.raises(FormatError, match=message):
        parse_manifest(encode(changed(sound, path, value)))


def test_a_golden_member_of_another_size_than_its_tensor(sound):
    index = next(i for i, m in enumerate(sound["members"]) if m["path"] == "golden/inputs/image.bin")
    with pytest.raises(FormatError, match=r"image.bin' has 33 bytes.*has 32"):
        parse_manifest(encode(changed(sound, f"members/{index}/size", 33)))


def test_a_member_that_nothing_uses(sound):
    data = copy.deepcopy(sound)
    data["members"].append({"path": "payload.so", "size": 5, "sha256": "0" * 64})
    with pytest.raises(FormatError, match=r"'payload.so' belongs to no variant"):
        parse_manifest(encode(data))


def test_a_member_that_stands_twice(sound):
    data = copy.deepcopy(sound)
    data["members"].append(data["members"][0])
    with pytest.raises(FormatError, match="stands twice"):
        parse_manifest(encode(data))


def test_a_member_that_is_the_folder_of_another(sound):
    data = changed(sound, "variants/0/member", "golden/inputs")
    index = next(i for i, m in enumerate(sound["members"]) if m["path"] == "models/onnx-float32.onnx")
    with pytest.raises(FormatError, match="folder"):
        parse_manifest(encode(changed(data, f"members/{index}/path", "golden/inputs")))


def test_too_many_members_and_variants(sound):
    many = [{"path": f"m{i}", "size": 1, "sha256": "0" * 64} for i in range(1025)]
    with pytest.raises(FormatError, match="1025 entries"):
        parse_manifest(encode(changed(sound, "members", many)))
    with pytest.raises(FormatError, match="65 entries"):
        parse_manifest(encode(changed(sound, "variants", [sound["variants"][0]] * 65)))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b"{} {}", "JSON"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"a": "\\ud800"}', "UTF-8"),
        (b'{"\\udfff": 1}', "UTF-8"),
        (b'{"a": 1, "a": 1}', "'a' stands twice"),
        (b'{"x": {"a": 1, "b": 2, "\\u0061": 3}}', "'a' stands twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "64-bit float"),
        (b'{"a": 0.' + b"1" * 5000 + b"}", "64-bit float"),
        (b'{"a": 9223372036854775808}', "64 bits"),
        (b'{"a": -9223372036854775809}', "64 bits"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "64 bits"),
        (b'{"a": ' + b"[" * 33 + b"]" * 33 + b"}", "deeper"),
        (b'{"a": ' * 100_000, "deeper"),
        (b"[" * 2_000_000, "deeper|values"),
        (b'{"a": [' + b"0," * 1_000_000 + b"0]}", "200000 values"),
        (b'{"a": [' + b"[]," * 1_000_000 + b"0]}", "200000 values"),
        (b'{"a": [' + b'"",' * 1_000_000 + b"0]}", "200000 values"),
        (b'{"' + b'\\"' * 2_000_000, "JSON"),
        (b'{"a": "' + b"\\" * 2_000_001, "JSON"),
        (b" " * (MAX_MANIFEST_SIZE_BYTES + 1), "4194305 bytes"),
    ],
)
def test_hostile_json_is_refused_in_little_memory(raw, message):
    def refused() -> None:
        with pytest.raises(FormatError, match=message):
            parse_manifest(raw)

    assert peak_bytes(refused) < 64 << 20


def test_brackets_and_quotes_inside_strings_do_not_count(sound):
    odd = '[{"\\' * 40
    data = changed(sound, "provenance", {odd: [odd, "\\", '\\"', "\\\\"], "nested": [[[["deep"]]]]})
    assert parse_manifest(encode(data)).provenance == data["provenance"]


def test_depth_of_exactly_the_cap_is_allowed(sound):
    value: Any = 1
    for _ in range(30):
        value = [value]
    assert parse_manifest(encode(changed(sound, "provenance", {"a": value})))
    with pytest.raises(FormatError, match="deeper"):
        parse_manifest(encode(changed(sound, "provenance", {"a": [value]})))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.sampled_from(["onnx", "float32", "logits", "N", "argmax", "golden/inputs/image.bin", "0" * 64]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


@settings(max_examples=effort(400), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_change_of_a_manifest_parses_or_is_a_typed_error(sound, data):
    broken = copy.deepcopy(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        places = _places(broken)
        container, key = places[data.draw(st.integers(0, len(places) - 1))]
        action = data.draw(st.sampled_from(["replace", "remove", "double", "swap"]))
        if action == "replace":
            container[key] = data.draw(json_values)
        elif action == "remove":
            del container[key]
        elif action == "double" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            other, place = places[data.draw(st.integers(0, len(places) - 1))]
            container[key] = copy.deepcopy(other[place])
    try:
        manifest = parse_manifest(encode(broken))
    except BundleError as error:
        assert len(str(error)) < 1000
    else:
        _check_promises(manifest)


def _check_promises(manifest) -> None:
    """What every parsed manifest gives to those who use it without a second look."""
    used = [v.member for v in manifest.variants] + [t.member for t in manifest.golden.tensors()]
    assert sorted(used) == sorted(member.path for member in manifest.members)
    zeros = {member.path: bytes(min(member.size_bytes, 1 << 20)) for member in manifest.members}
    arrays = load_golden(zeros.__getitem__, manifest)
    assert set(arrays.inputs) == {spec.name for spec in manifest.interface.inputs}
    for variant in manifest.variants:
        assert set(arrays.variants[variant.name]) == {spec.name for spec in manifest.interface.outputs}


@settings(max_examples=effort(200), deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_typed_error(raw):
    with pytest.raises(BundleError):
        parse_manifest(raw)


@settings(max_examples=effort(200), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_damage_of_the_text_parses_or_is_a_typed_error(sound, data):
    raw = bytearray(encode(sound))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        _check_promises(parse_manifest(bytes(raw)))
    except BundleError as error:
        assert len(str(error)) < 1000


# What the file may do although each manifest alone is sound.


def _parts(path) -> tuple[dict[str, Any], list[bytes]]:
    with open_bundle(path) as bundle:
        return manifest_data(path), [bundle.read(member.path) for member in bundle.manifest.members]


def test_an_unlisted_member_is_refused(tmp_path):
    data, members = _parts(make_bundle(tmp_path))
    with pytest.raises(FormatError, match="7 members"):
        open_bundle(assemble(tmp_path / "more.outrider", data, [*members, b"payload"]))
    with pytest.raises(FormatError, match="its manifest says"):
        open_bundle(assemble(tmp_path / "more.outrider", data, [*members, b"payload"], presence=b"\1" * 6))


def test_a_member_longer_or_shorter_than_listed_is_refused(tmp_path):
    data, members = _parts(make_bundle(tmp_path))
    for size in (-1, 1):
        broken = [*members[:-1], members[-1][:-1] if size < 0 else members[-1] + b"x"]
        with pytest.raises(FormatError, match="its manifest says"):
            open_bundle(assemble(tmp_path / "size.outrider", data, broken))


def test_only_files_of_variants_may_be_absent_and_not_all(tmp_path):
    data, members = _parts(make_bundle(tmp_path))
    paths = [member["path"] for member in data["members"]]

    def presence(absent: set[str]) -> bytes:
        return bytes(path not in absent for path in paths)

    def build(absent: set[str]):
        here = [m for m, path in zip(members, paths, strict=True) if path not in absent]
        return assemble(tmp_path / "thin.outrider", data, here, presence=presence(absent))

    models = {path for path in paths if path.startswith("models/")}
    with open_bundle(build({"models/onnx-float32.onnx"})) as bundle:
        assert bundle.present == set(paths) - {"models/onnx-float32.onnx"}
        with pytest.raises(BundleError, match="thin bundle"):
            bundle.read("models/onnx-float32.onnx")
        with pytest.raises(BundleError, match="no member 'x'"):
            bundle.read("x")
    with pytest.raises(FormatError, match="absent; only files of variants"):
        open_bundle(build({"golden/inputs/image.bin"}))
    with pytest.raises(FormatError, match="every variant is absent"):
        open_bundle(build(models))


def test_a_key_that_signed_twice_is_refused(tmp_path):
    from support.keys import private_key

    path = make_bundle(tmp_path, keys=[private_key(1)])
    data, members = _parts(path)
    records = split(path)["records"]
    raw = split(path)["manifest"]
    with pytest.raises(FormatError, match="signed twice"):
        open_bundle(assemble(tmp_path / "twice.outrider", raw, members, records=records * 2))
    assert data["name"] == "tiny"


def test_the_reader_does_not_need_our_writers_json(tmp_path):
    data, members = _parts(make_bundle(tmp_path))
    text = json.dumps(dict(reversed(data.items())), indent=4, ensure_ascii=False).encode()
    with open_bundle(assemble(tmp_path / "other.outrider", text, members)) as bundle:
        assert bundle.manifest.raw == text
