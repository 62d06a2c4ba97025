"""Text to tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider_runtimes.errors import FormatError, InputError
from outrider_runtimes.processing import TokenLookup, encode_text
from support.effort import effort
from support.steps import run, spec_of

WORDS = ("the", "cat", "sat", "its", "größe", "it's")
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


def lookup(texts, **keys):
    step = TokenLookup(**{"tensor": "text", "vocabulary": WORDS, "length": 5, **keys})
    return run(step, {"text": encode_text(texts)}, {"text": "NT"}, free="T")["text"].tolist()


def test_words_unknown_words_and_padding():
    assert lookup(["The cat, sat!", "", "dog cat", "a b c d e the"]) == [
        [2, 3, 4, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 3, 0, 0, 0],
        [1, 1, 1, 1, 1],
    ]


def test_every_rule_can_be_turned():
    texts = ["The it's GRÖSSE größe"]
    assert lookup(texts) == [[2, 5, 1, 6, 0]]
    assert lookup(texts, strip_punctuation=False) == [[2, 7, 1, 6, 0]]
    assert lookup(texts, lowercase=False) == [[1, 5, 1, 6, 0]]
    assert lookup(texts, pad_id=9, unknown_id=8, first_id=20, length=6) == [[20, 23, 8, 24, 9, 9]]


def test_the_dtype_is_as_asked():
    step = TokenLookup(tensor="text", vocabulary=WORDS, length=2, dtype="int64")
    assert step.apply({"text": encode_text(["cat"])}, {})["text"].dtype == np.int64


def plain(text, length, *, lowercase, strip):
    """The rule, character by character."""
    text = text.lower() if lowercase else text
    if strip:
        text = "".join(character for character in text if character not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    numbers = [WORDS.index(word) + 2 if word in WORDS else 1 for word in text.split()][:length]
    return numbers + [0] * (length - len(numbers))


@settings(max_examples=effort(80), deadline=None)
@given(
    st.lists(st.one_of(TEXTS, st.lists(st.sampled_from([*WORDS, "The", "dog."])).map(" ".join)), max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_any_text_follows_the_rule(texts, lowercase, strip):
    wanted = [plain(text, 5, lowercase=lowercase, strip=strip) for text in texts]
    assert lookup(texts, lowercase=lowercase, strip_punctuation=strip) == wanted


@given(st.lists(TEXTS, max_size=4), st.integers(0, 9))
def test_encoded_text_is_utf8_padded_with_zeros(texts, spare):
    length = max([1, *(len(text.encode()) for text in texts)]) + spare
    made = encode_text(texts, length)
    assert made.dtype == np.uint8 and made.shape == (len(texts), length)
    assert [bytes(row).rstrip(b"\0").decode() for row in made] == texts
    assert encode_text(texts).shape == (len(texts), length - spare)


def test_a_text_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="text 1 has 5 bytes of UTF-8, expected at most 4"):
        encode_text(["abc", "grün"], 4)
    with pytest.raises(InputError, match="none of zero"):
        encode_text(["a\0b"])


@pytest.mark.parametrize(
    ("row", "match"),
    [(b"ab\xff\0", "row 1 is not UTF-8 at byte 2"), (b"a\0b\0", "row 1 has a zero byte inside its text")],
)
def test_bytes_that_are_no_text_are_refused_by_row(row, match):
    text = np.frombuffer(b"cat\0" + row, np.uint8).reshape(2, 4)
    with pytest.raises(InputError, match=match) as caught:
        TokenLookup(tensor="text", vocabulary=WORDS, length=3).apply({"text": text}, {})
    assert caught.value.tensor == "text"


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"vocabulary": ("a", "b", "a")}, "vocabulary: a word is there twice"),
        ({"vocabulary": ()}, "vocabulary: expected a list of 1"),
        ({"vocabulary": ("a", 3)}, "vocabulary: expected a text"),
        ({"vocabulary": "abc"}, "vocabulary: expected a list"),
        ({"length": 8193}, "length: expected"),
        ({"first_id": 2**31 - 2}, "first_id: the last word's number is beyond"),
        ({"lowercase": 1}, "lowercase: expected true or false"),
        ({"pad_id": -1}, "pad_id: expected"),
    ],
)
def test_a_hostile_key_is_refused(keys, match):
    with pytest.raises(FormatError, match=match):
        TokenLookup(**{"tensor": "text", "vocabulary": ("a", "b", "c"), "length": 3, **keys})


def test_only_bytes_are_text():
    step = TokenLookup(tensor="text", vocabulary=WORDS, length=3)
    with pytest.raises(FormatError, match="'text' is int32, expected uint8"):
        step.specs({"text": spec_of("text", np.zeros((1, 4), np.int32), "NT")}, {})
