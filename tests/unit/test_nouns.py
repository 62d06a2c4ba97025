"""The quick frozen dataclass does what the standard one does."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from dataclasses import field
from functools import cached_property
from typing import Any

import pytest

from outrider_runtimes import nouns


@nouns.dataclass(frozen=True, kw_only=True)
class Quick:
    """Of two fields that count and one that does not."""

    name: str
    sizes: tuple[int, ...] = ()
    note: str = field(default="", repr=False, compare=False)
    more: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("no name")

    @cached_property
    def total(self) -> int:
        """Of the sizes."""
        return sum(self.sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standard:
    """The same by the standard decorator."""

    name: str
    sizes: tuple[int, ...] = ()
    note: str = field(default="", repr=False, compare=False)
    more: dict[str, int] = field(default_factory=dict, repr=False, compare=False)


BOTH = pytest.mark.parametrize("kind", [Quick, Standard])


@BOTH
def test_equality_and_hash_go_by_the_fields_that_are_compared(kind: Callable[..., Any]) -> None:
    one = kind(name="a", sizes=(1, 2), note="x")
    assert one == kind(name="a", sizes=(1, 2), note="y")
    assert hash(one) == hash(kind(name="a", sizes=(1, 2)))
    assert one != kind(name="a", sizes=(1, 3))
    assert one != ("a", (1, 2))
    assert len({one, kind(name="a", sizes=(1, 2)), kind(name="b")}) == 2
    with pytest.raises(TypeError, match="unhashable"):
        hash(kind(name="a", sizes=[1]))


def test_two_classes_with_the_same_fields_are_not_equal() -> None:
    others: list[object] = [Standard(name="a")]
    assert Quick(name="a") not in others


def test_the_repr_is_the_standard_one_s() -> None:
    assert repr(Quick(name="a", note="hidden")) == repr(Standard(name="a", note="hidden")).replace("Standard", "Quick")


@BOTH
def test_nothing_of_it_changes_once_it_is_made(kind: Callable[..., Any]) -> None:
    noun = kind(name="a")
    for name in ("name", "note", "another"):
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot assign to field '{name}'"):
            setattr(noun, name, "b")
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'name'"):
        del noun.name
    assert noun == kind(name="a")


@BOTH
def test_arguments_go_by_name_and_are_all_known(kind: Callable[..., Any]) -> None:
    for arguments in ((), ("a",)):
        with pytest.raises(TypeError):
            kind(*arguments)
    with pytest.raises(TypeError, match="name"):
        kind(sizes=(1,))
    with pytest.raises(TypeError, match="colour"):
        kind(name="a", colour="red")


@BOTH
def test_the_functions_of_dataclasses_work(kind: Callable[..., Any]) -> None:
    noun = kind(name="a", sizes=(1,), note="n")
    assert dataclasses.asdict(noun) == {"name": "a", "sizes": (1,), "note": "n", "more": {}}
    assert dataclasses.replace(noun, name="b") == kind(name="b", sizes=(1,))
    assert [each.name for each in dataclasses.fields(noun)] == ["name", "sizes", "note", "more"]
    for again in (copy.deepcopy(noun), pickle.loads(pickle.dumps(noun))):
        assert again == noun
        assert again.note == "n"


@BOTH
def test_a_default_that_is_made_is_each_one_s_own(kind: Callable[..., Any]) -> None:
    one, other = kind(name="a"), kind(name="a")
    assert one.more == other.more == {}
    assert one.more is not other.more


def test_its_signature_is_the_standard_one_s() -> None:
    quick, standard = inspect.signature(Quick).parameters, inspect.signature(Standard).parameters
    assert [(each.name, each.kind, each.annotation) for each in quick.values()] == [
        (each.name, each.kind, each.annotation) for each in standard.values()
    ]
    assert [quick[name].default for name in ("name", "sizes", "note")] == [inspect.Parameter.empty, (), ""]


def test_what_a_class_checks_and_computes_itself_stays() -> None:
    with pytest.raises(ValueError, match="no name"):
        Quick(name="")
    assert Quick(name="a", sizes=(1, 2)).total == 3
