"""What a bundle says of itself: the nouns, and the strict way from bytes to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import field
from functools import cache, cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from outrider.bundle.fields import (
    Json,
    as_object,
    check_distinct,
    get_flag,
    get_integer,
    get_list,
    get_mapping,
    get_match,
    get_string,
    wrapped,
)
from outrider.bundle.limits import MAX_MANIFEST_SIZE_BYTES, MAX_MEMBER_SIZE_BYTES, MAX_MEMBERS
from outrider_runtimes import strictjson
from outrider_runtimes.errors import BundleError, FormatError, UnsupportedBundle
from outrider_runtimes.nouns import dataclass
from outrider_runtimes.tensors import Binding, Interface

if TYPE_CHECKING:
    from outrider.bundle.golden import Golden
    from outrider.bundle.offload import OffloadRule

MANIFEST_FORMAT = 1
STEPS = "steps"
SIGNATURES = "signatures"
KNOWN_REQUIRES: frozenset[str] = frozenset([STEPS, SIGNATURES])  # names that a bundle may list under ``requires``
FORMATS = ("onnx", "tflite")
MAX_VARIANTS = 64
MAX_PATH_LENGTH = 255
MAX_JSON_DEPTH = 32
# A parsed value costs up to 100 bytes, so that this keeps the parse of a 4 MiB text under 50 MB.
MAX_JSON_VALUES = 200_000
MAX_VERSION = 2**53 - 1  # a JSON number that every reader holds exactly

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_PATH = re.compile(r"[a-z0-9][a-z0-9._/-]*\Z")
SHA256 = re.compile(r"[0-9a-f]{64}\Z")


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
class Manifest:
    """A bundle's manifest. ``raw`` are its bytes as they were hashed and signed, with whatever else they hold."""

    name: str
    version: int
    requires: tuple[str, ...]
    interface: Interface
    variants: tuple[Variant, ...]
    members: tuple[Member, ...]
    provenance: Mapping[str, Any]
    raw: bytes = field(repr=False)
    golden_data: Json = field(repr=False)
    offload: OffloadRule | None = None
    cloud_only: bool = False

    @cached_property
    def digest(self) -> str:
        """The bundle's identity: sha256 of ``raw`` in hex."""
        return manifest_digest(self.raw)

    @cached_property
    def golden(self) -> Golden:
        """The inputs and answers that it was packed with. Raises FormatError where ``parse_manifest`` did not look."""
        from outrider.bundle.golden import parse_golden  # what is installed is loaded without it

        return parse_golden(self.golden_data, self.interface, self.variants)

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


def manifest_digest(raw: bytes) -> str:
    """The sha256 of a manifest's bytes in hex."""
    return str(_sha256()(raw).hexdigest())


@cache
def _sha256() -> Callable[[bytes], Any]:
    """The interpreter's own, where it has one; ``hashlib`` loads OpenSSL, 3 ms and 2 MB that pay for large files."""
    for name in ("_sha2", "_sha256"):  # since Python 3.12, and before
        with suppress(ImportError):
            own: Callable[[bytes], Any] = import_module(name).sha256
            return own
    import hashlib

    return hashlib.sha256


def parse_manifest(raw: bytes, *, known: bool = False) -> Manifest:
    """The manifest in ``raw``, checked whole: what comes out breaks no rule of docs/bundle-format.md.

    Unknown keys are left alone (they stay in ``raw``).

    Args:
        known: these very bytes were checked whole before, as their sha256 shows: the golden is then looked at when it
            is asked for.

    Raises:
        FormatError: naming the key and what was expected.
        UnsupportedBundle: made for a newer reader.
    """
    data = parse_json(raw, "manifest", max_bytes=MAX_MANIFEST_SIZE_BYTES)
    requires = _parse_requires(data)
    interface = _parse_interface(data, requires)
    variants = _parse_variants(data, interface, requires)
    members = _parse_members(data)
    manifest = Manifest(
        name=get_match(data, "name", NAME),
        version=get_integer(data, "version", 1, MAX_VERSION),
        requires=requires,
        interface=interface,
        variants=variants,
        members=members,
        provenance=get_mapping(data, "provenance") if "provenance" in data else {},
        offload=_parse_offload(data, interface, variants) if "offload" in data else None,
        cloud_only=get_flag(data, "cloud_only"),
        raw=raw,
        golden_data=get_mapping(data, "golden"),
    )
    if not known:
        from outrider.bundle.golden import check_references

        check_references(variants, manifest.golden, members)
    return manifest


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
    if get_integer(data, "format", 1, MAX_VERSION) != MANIFEST_FORMAT:
        raise UnsupportedBundle(
            f"the manifest has format {data['format']}, this Outrider reads format {MANIFEST_FORMAT}",
            hint="upgrade Outrider, or export the bundle again with this version",
        )
    requires = get_list(data, "requires")
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
    entry = get_mapping(data, "interface")
    interface = wrapped("interface", lambda: Interface.from_dict(entry))
    if (interface.processing is not None) != (STEPS in requires):
        raise FormatError(f"manifest: an interface has steps if and only if {STEPS!r} stands under requires")
    for spec in (*interface.inputs, *interface.outputs, *interface.network.inputs, *interface.network.outputs):
        if spec.batched and spec.shape[0] is not None:
            raise FormatError(f"manifest: interface: {spec.name[:64]!r} fixes N to {spec.shape[0]}; it must be null")
    return interface


def _parse_variants(data: Json, interface: Interface, requires: Sequence[str]) -> tuple[Variant, ...]:
    items = get_list(data, "variants", least=1, most=MAX_VARIANTS)
    variants = tuple(_parse_variant(item, f"variants[{i}]", interface) for i, item in enumerate(items))
    check_distinct([variant.name for variant in variants], "variant name")
    if any(variant.binding.signatures for variant in variants) != (SIGNATURES in requires):
        raise FormatError(f"manifest: a binding has signatures if and only if {SIGNATURES!r} stands under requires")
    return variants


def required_names(interface: Interface, variants: Sequence[Variant]) -> list[str]:
    """What stands under ``requires``: the names of what an old reader must not ignore."""
    signatures = any(variant.binding.signatures for variant in variants)
    return [name for name, used in ((SIGNATURES, signatures), (STEPS, interface.processing is not None)) if used]


def _parse_variant(item: Any, at: str, interface: Interface) -> Variant:
    entry = as_object(item, at)
    kind = get_string(entry, "format", at)
    if kind not in FORMATS:
        raise UnsupportedBundle(
            f"{at}: model format {kind[:64]!r} is unknown to this version of Outrider",
            hint=f"it knows {', '.join(FORMATS)}",
        )
    return Variant(
        name=get_match(entry, "name", NAME, at),
        format=kind,
        precision=get_match(entry, "precision", NAME, at),
        member=get_string(entry, "member", at),
        binding=wrapped(at, lambda: Binding.from_dict(get_mapping(entry, "binding", at), interface.network)),
        measured=get_mapping(entry, "measured", at) if "measured" in entry else {},
    )


def _parse_offload(data: Json, interface: Interface, variants: Sequence[Variant]) -> OffloadRule:
    from outrider.bundle.offload import parse_offload  # only where there is a rule

    entry = get_mapping(data, "offload")
    return wrapped("offload", lambda: parse_offload(entry, interface, [variant.name for variant in variants]))


def _parse_members(data: Json) -> tuple[Member, ...]:
    items = get_list(data, "members", least=1, most=MAX_MEMBERS)
    members = tuple(_parse_member(item, f"members[{i}]") for i, item in enumerate(items))
    check_distinct([member.path for member in members], "member path")
    paths = {member.path for member in members}
    for path in paths:
        parts = path.split("/")
        folder = next((f for f in ("/".join(parts[:n]) for n in range(1, len(parts))) if f in paths), None)
        if folder is not None:
            raise FormatError(f"manifest: member {folder!r} is also the folder of member {path!r}")
    return members


def _parse_member(item: Any, at: str) -> Member:
    entry = as_object(item, at)
    return Member(
        path=check_path(get_string(entry, "path", at)),
        size_bytes=get_integer(entry, "size", 1, MAX_MEMBER_SIZE_BYTES, at),
        sha256=get_match(entry, "sha256", SHA256, at),
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
