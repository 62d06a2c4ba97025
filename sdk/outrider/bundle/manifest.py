"""What a bundle says of itself: the nouns, and the strict way from bytes to them."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from outrider.bundle import format as layout_rules
from outrider.bundle.offload import OffloadRule, parse_offload
from outrider_runtimes import strictjson
from outrider_runtimes.errors import BundleError, FormatError, OutriderError, UnsupportedBundle
from outrider_runtimes.golden import DecisionCheck
from outrider_runtimes.tensors import DTYPES, Binding, Interface, TensorSpec

MANIFEST_FORMAT = 1
STEPS = "steps"
SIGNATURES = "signatures"
KNOWN_REQUIRES: frozenset[str] = frozenset([STEPS, SIGNATURES])  # names that a bundle may list under ``requires``
FORMATS = ("onnx", "tflite")
MAX_VARIANTS = 64
MAX_GOLDEN_ROWS = 65_536
MAX_PATH_LENGTH = 255
MAX_JSON_DEPTH = 32
# A parsed value costs up to 100 bytes, so that this keeps the parse of a 4 MiB text under 50 MB.
MAX_JSON_VALUES = 200_000
MAX_VERSION = 2**53 - 1  # a JSON number that every reader holds exactly

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_PATH = re.compile(r"[a-z0-9][a-z0-9._/-]*\Z")
SHA256 = re.compile(r"[0-9a-f]{64}\Z")

Json = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file in a bundle. ``sha256`` is in hex."""

    path: str
    size_bytes: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {"path": self.path, "size": self.size_bytes, "sha256": self.sha256}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model file in one format and precision.

    Attributes:
        name: like ``onnx-float32``.
        format: ``onnx`` or ``tflite``.
        precision: like ``float32`` or ``int8``.
        member: path of the model file.
        binding: how its tensors are made from the interface's.
        measured: what the export measured of it, free JSON.
    """

    name: str
    format: str
    precision: str
    member: str
    binding: Binding
    measured: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {
            "name": self.name,
            "format": self.format,
            "precision": self.precision,
            "member": self.member,
            "binding": self.binding.to_dict(),
            "measured": dict(self.measured),
        }


@dataclass(frozen=True, kw_only=True)
class GoldenTensor:
    """A tensor stored as a member: little-endian, C order, nothing else in the file."""

    member: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """What the member must measure."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {"member": self.member, "dtype": self.dtype, "shape": list(self.shape)}


GoldenTensors = Mapping[str, GoldenTensor]


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Inputs and the answers that must come back.

    Attributes:
        rows: N of every batched tensor here.
        inputs: by interface input.
        reference: by output of the network, before any postprocessing; the answers of the model that the variants were
            made from.
        variants: by variant, by output; each variant's own answers on the machine that made it.
        tolerance: by variant, by output; the largest absolute difference to the variant's own answers.
        decision: what must agree with the reference.
    """

    rows: int
    inputs: GoldenTensors
    reference: GoldenTensors
    variants: Mapping[str, GoldenTensors]
    tolerance: Mapping[str, Mapping[str, float]]
    decision: DecisionCheck

    def tensors(self) -> list[GoldenTensor]:
        """All of them."""
        groups = [self.inputs, self.reference, *self.variants.values()]
        return [tensor for group in groups for tensor in group.values()]

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {
            "rows": self.rows,
            "inputs": _dicts(self.inputs),
            "reference": _dicts(self.reference),
            "variants": {name: _dicts(tensors) for name, tensors in self.variants.items()},
            "tolerance": {name: dict(bounds) for name, bounds in self.tolerance.items()},
            "decision": self.decision.to_dict(),
        }


def _dicts(tensors: GoldenTensors) -> dict[str, Any]:
    return {name: tensor.to_dict() for name, tensor in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A bundle's manifest. ``raw`` are its bytes as they were hashed and signed, with whatever else they hold."""

    name: str
    version: int
    requires: tuple[str, ...]
    interface: Interface
    variants: tuple[Variant, ...]
    golden: Golden
    members: tuple[Member, ...]
    provenance: Mapping[str, Any]
    raw: bytes = field(repr=False)
    offload: OffloadRule | None = None

    @cached_property
    def digest(self) -> str:
        """The bundle's identity: sha256 of ``raw`` in hex."""
        return hashlib.sha256(self.raw).hexdigest()

    def variant(self, name: str) -> Variant:
        """The variant of that name. Raises BundleError that lists the names there are."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        names = ", ".join(variant.name for variant in self.variants)
        raise BundleError(f"bundle {self.name!r} has no variant {name!r}", hint=f"it has: {names}")

    def member(self, path: str) -> Member:
        """The member of that path. Raises BundleError."""
        for member in self.members:
            if member.path == path:
                return member
        raise BundleError(f"bundle {self.name!r} has no member {path!r}")


def parse_manifest(raw: bytes) -> Manifest:
    """The manifest in ``raw``, checked whole: what comes out breaks no rule of docs/bundle-format.md.

    Unknown keys are left alone (they stay in ``raw``).

    Raises:
        FormatError: naming the key and what was expected.
        UnsupportedBundle: made for a newer reader.
    """
    data = parse_json(raw, "manifest", max_bytes=layout_rules.MAX_MANIFEST_SIZE_BYTES)
    requires = _parse_requires(data)
    interface = _parse_interface(data, requires)
    variants = _parse_variants(data, interface, requires)
    members = _parse_members(data)
    golden = _parse_golden(_mapping(data, "golden"), interface, variants)
    _check_references(variants, golden, members)
    return Manifest(
        name=_match(data, "name", NAME),
        version=_integer(data, "version", 1, MAX_VERSION),
        requires=requires,
        interface=interface,
        variants=variants,
        golden=golden,
        members=members,
        provenance=_mapping(data, "provenance") if "provenance" in data else {},
        offload=_parse_offload(data, interface, variants) if "offload" in data else None,
        raw=raw,
    )


def parse_json(raw: bytes, what: str, *, max_bytes: int) -> dict[str, Any]:
    """The object in ``raw`` by docs/bundle-format.md, "Manifest". Raises FormatError that begins with ``what``."""
    return strictjson.parse(
        raw,
        lambda problem: FormatError(f"{what}: {problem}"),
        max_bytes=max_bytes,
        max_depth=MAX_JSON_DEPTH,
        max_values=MAX_JSON_VALUES,
        parse_int=strictjson.integer_64,
        parse_float=strictjson.finite_float,
    )


def _parse_requires(data: Json) -> tuple[str, ...]:
    """What decides whether this reader may go on at all; looked at before anything else."""
    if _integer(data, "format", 1, MAX_VERSION) != MANIFEST_FORMAT:
        raise UnsupportedBundle(
            f"the manifest has format {data['format']}, this Outrider reads format {MANIFEST_FORMAT}",
            hint="upgrade Outrider, or export the bundle again with this version",
        )
    requires = _list(data, "requires")
    if not all(isinstance(item, str) for item in requires):
        raise FormatError("manifest: requires: expected strings")
    unknown = [item for item in requires if item not in KNOWN_REQUIRES]
    if unknown:
        raise UnsupportedBundle(
            f"the bundle requires {unknown[0][:64]!r}, which this version of Outrider does not have",
            hint="upgrade Outrider, or export the bundle without it",
        )
    return tuple(requires)


def _parse_interface(data: Json, requires: Sequence[str]) -> Interface:
    entry = _mapping(data, "interface")
    interface = _wrapped("interface", lambda: Interface.from_dict(entry))
    if (interface.processing is not None) != (STEPS in requires):
        raise FormatError(f"manifest: an interface has steps if and only if {STEPS!r} stands under requires")
    for spec in (*interface.inputs, *interface.outputs, *interface.network.inputs, *interface.network.outputs):
        if spec.batched and spec.shape[0] is not None:
            raise FormatError(f"manifest: interface: {spec.name[:64]!r} fixes N to {spec.shape[0]}; it must be null")
    return interface


def _parse_variants(data: Json, interface: Interface, requires: Sequence[str]) -> tuple[Variant, ...]:
    items = _list(data, "variants", least=1, most=MAX_VARIANTS)
    variants = tuple(_parse_variant(item, f"variants[{i}]", interface) for i, item in enumerate(items))
    _distinct([variant.name for variant in variants], "variant name")
    if any(variant.binding.signatures for variant in variants) != (SIGNATURES in requires):
        raise FormatError(f"manifest: a binding has signatures if and only if {SIGNATURES!r} stands under requires")
    return variants


def required_names(interface: Interface, variants: Sequence[Variant]) -> list[str]:
    """What stands under ``requires``: the names of what an old reader must not ignore."""
    signatures = any(variant.binding.signatures for variant in variants)
    return [name for name, used in ((SIGNATURES, signatures), (STEPS, interface.processing is not None)) if used]


def _parse_variant(item: Any, at: str, interface: Interface) -> Variant:
    entry = _object(item, at)
    kind = _string(entry, "format", at)
    if kind not in FORMATS:
        raise UnsupportedBundle(
            f"{at}: model format {kind[:64]!r} is unknown to this version of Outrider",
            hint=f"it knows {', '.join(FORMATS)}",
        )
    return Variant(
        name=_match(entry, "name", NAME, at),
        format=kind,
        precision=_match(entry, "precision", NAME, at),
        member=_string(entry, "member", at),
        binding=_wrapped(at, lambda: Binding.from_dict(_mapping(entry, "binding", at), interface.network)),
        measured=_mapping(entry, "measured", at) if "measured" in entry else {},
    )


def _parse_offload(data: Json, interface: Interface, variants: Sequence[Variant]) -> OffloadRule:
    entry = _mapping(data, "offload")
    return _wrapped("offload", lambda: parse_offload(entry, interface, [variant.name for variant in variants]))


def _parse_members(data: Json) -> tuple[Member, ...]:
    items = _list(data, "members", least=1, most=layout_rules.MAX_MEMBERS)
    members = tuple(_parse_member(item, f"members[{i}]") for i, item in enumerate(items))
    _distinct([member.path for member in members], "member path")
    paths = {member.path for member in members}
    for path in paths:
        parts = path.split("/")
        folder = next((f for f in ("/".join(parts[:n]) for n in range(1, len(parts))) if f in paths), None)
        if folder is not None:
            raise FormatError(f"manifest: member {folder!r} is also the folder of member {path!r}")
    return members


def _parse_member(item: Any, at: str) -> Member:
    entry = _object(item, at)
    return Member(
        path=check_path(_string(entry, "path", at)),
        size_bytes=_integer(entry, "size", 1, layout_rules.MAX_MEMBER_SIZE_BYTES, at),
        sha256=_match(entry, "sha256", SHA256, at),
    )


def check_path(path: str) -> str:
    """The path itself, if a member may have it. Raises FormatError."""
    segments = path.split("/")
    if len(path) > MAX_PATH_LENGTH or not _PATH.match(path) or any(s in ("", ".", "..") for s in segments):
        raise FormatError(
            f"manifest: member path {path[:64]!r} is not allowed",
            hint="lower-case letters, digits, '.', '_', '-' and '/' between segments; no '.' or '..' segment",
        )
    return path


def _parse_golden(data: Json, interface: Interface, variants: tuple[Variant, ...]) -> Golden:
    rows = _integer(data, "rows", 1, MAX_GOLDEN_ROWS, "golden")
    names = [variant.name for variant in variants]
    given = interface.judged.outputs
    outputs = [spec.name for spec in given]

    def tensors(owner: Json, key: str, specs: Sequence[TensorSpec], at: str) -> dict[str, GoldenTensor]:
        entries = _keyed(owner, key, [spec.name for spec in specs], at)
        return {spec.name: _parse_tensor(entries[spec.name], spec, rows, f"{at}.{key}.{spec.name}") for spec in specs}

    answers = _keyed(data, "variants", names, "golden")
    bounds = _keyed(data, "tolerance", names, "golden")
    return Golden(
        rows=rows,
        inputs=tensors(data, "inputs", interface.inputs, "golden"),
        reference=tensors(data, "reference", given, "golden"),
        variants={name: tensors(answers, name, given, "golden.variants") for name in names},
        tolerance={name: _parse_bounds(bounds, name, outputs) for name in names},
        decision=_parse_decision(_mapping(data, "decision", "golden"), interface.judged),
    )


def _parse_tensor(item: Any, spec: TensorSpec, rows: int, at: str) -> GoldenTensor:
    entry = _object(item, at)
    shape = tuple(_list(entry, "shape", at=at, most=16))
    if any(type(size) is not int or not 1 <= size < 2**31 for size in shape):
        raise FormatError(f"manifest: {at}: shape {list(shape)} is not made of sizes of 1 and more")
    wanted = (rows, *spec.shape[1:]) if spec.batched else spec.shape
    if len(shape) != len(wanted) or any(w is not None and s != w for s, w in zip(shape, wanted, strict=True)):
        raise FormatError(f"manifest: {at}: shape {list(shape)}, the interface and rows say {list(wanted)}")
    dtype = _string(entry, "dtype", at)
    if dtype != spec.dtype or dtype not in DTYPES:
        raise FormatError(f"manifest: {at}: dtype {dtype[:32]!r}, the interface says {spec.dtype!r}")
    return GoldenTensor(member=_string(entry, "member", at), dtype=dtype, shape=shape)


def _parse_bounds(owner: Json, name: str, outputs: Sequence[str]) -> dict[str, float]:
    entries = _keyed(owner, name, outputs, "golden.tolerance")
    for output, bound in entries.items():
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or bound < 0:
            raise FormatError(f"manifest: golden.tolerance.{name}.{output}: expected a number of 0 or more")
    return {output: float(entries[output]) for output in outputs}


def _parse_decision(data: Json, interface: Interface) -> DecisionCheck:
    decision = _wrapped("golden.decision", lambda: DecisionCheck.from_dict(data))
    if decision.kind == "none":
        return decision
    spec = next((spec for spec in interface.outputs if spec.name == decision.output), None)
    if spec is None:
        raise FormatError(f"manifest: golden.decision.output: the interface has no output {decision.output[:64]!r}")
    axes = len(spec.shape)
    if not -axes <= decision.axis < axes or (spec.batched and decision.axis in (0, -axes)):
        raise FormatError(
            f"manifest: golden.decision.axis: {decision.axis} is no axis of {decision.output!r} to decide on"
        )
    return decision


def _check_references(variants: tuple[Variant, ...], golden: Golden, members: tuple[Member, ...]) -> None:
    """Each member is used once, each use has its member, and a golden member measures what its tensor does."""
    sizes = {member.path: member.size_bytes for member in members}
    tensors = golden.tensors()
    used = [variant.member for variant in variants] + [tensor.member for tensor in tensors]
    _distinct(used, "use of member")
    for path in used:
        if path not in sizes:
            raise FormatError(f"manifest: member {path[:64]!r} is used but not listed under members")
    unused = sorted(set(sizes) - set(used))
    if unused:
        raise FormatError(f"manifest: member {unused[0]!r} belongs to no variant and not to the golden")
    for tensor in tensors:
        if sizes[tensor.member] != tensor.size_bytes:
            raise FormatError(
                f"manifest: member {tensor.member!r} has {sizes[tensor.member]} bytes, "
                f"its {tensor.dtype} tensor {list(tensor.shape)} has {tensor.size_bytes}"
            )


def _wrapped(at: str, make: Callable[[], T]) -> T:
    """What other rooms parse, with every way in which odd JSON can break them turned into one error."""
    try:
        return make()
    except UnsupportedBundle as error:
        raise UnsupportedBundle(f"manifest: {at}: {error}", hint=error.hint) from None
    except FormatError as error:
        raise FormatError(f"manifest: {at}: {error}", hint=error.hint) from None
    except (OutriderError, KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise FormatError(f"manifest: {at}: malformed: {error!r}") from None


def _keyed(owner: Json, key: str, names: Sequence[str], at: str) -> Json:
    entries = _mapping(owner, key, at)
    if set(entries) != set(names):
        odd = sorted(set(entries) ^ set(names))[0]
        raise FormatError(
            f"manifest: {at}.{key}: {odd[:64]!r} is {'not expected' if odd in entries else 'missing'} there"
        )
    return entries


def _distinct(values: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise FormatError(f"manifest: {what} {value[:64]!r} stands twice")
        seen.add(value)


def _object(value: Any, at: str) -> Json:
    if not isinstance(value, dict):
        raise FormatError(f"manifest: {at}: expected an object, not {_kind(value)}")
    return value


def _get(data: Json, key: str, at: str) -> tuple[Any, str]:
    where = f"{at}.{key}" if at else key
    if key not in data:
        raise FormatError(f"manifest: {where}: is missing")
    return data[key], where


def _mapping(data: Json, key: str, at: str = "") -> Json:
    return _object(*_get(data, key, at))


def _list(data: Json, key: str, *, at: str = "", least: int = 0, most: int = 1024) -> list[Any]:
    value, where = _get(data, key, at)
    if not isinstance(value, list):
        raise FormatError(f"manifest: {where}: expected a list, not {_kind(value)}")
    if not least <= len(value) <= most:
        raise FormatError(f"manifest: {where}: has {len(value)} entries, allowed are {least} to {most}")
    return value


def _string(data: Json, key: str, at: str = "") -> str:
    value, where = _get(data, key, at)
    if not isinstance(value, str):
        raise FormatError(f"manifest: {where}: expected a string, not {_kind(value)}")
    return value


def _match(data: Json, key: str, pattern: re.Pattern[str], at: str = "") -> str:
    value = _string(data, key, at)
    if not pattern.match(value):
        where = f"{at}.{key}" if at else key
        raise FormatError(
            f"manifest: {where}: {value[:64]!r} does not match {pattern.pattern.removesuffix(chr(92) + 'Z')}"
        )
    return value


def _integer(data: Json, key: str, least: int, most: int, at: str = "") -> int:
    value, where = _get(data, key, at)
    if type(value) is not int:
        raise FormatError(f"manifest: {where}: expected an integer, not {_kind(value)}")
    if not least <= value <= most:
        raise FormatError(f"manifest: {where}: {value} is not within {least} to {most}")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
