"""Text to the numbers of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from string import punctuation
from typing import Annotated, ClassVar

import numpy as np

from outrider_runtimes.errors import FormatError, InputError
from outrider_runtimes.processing.base import CallerShapes, Shapes, Specs
from outrider_runtimes.processing.fields import Choice, Flag, Many, Name, StoredStep, Text, Whole
from outrider_runtimes.processing.rows import padded
from outrider_runtimes.processing.specs import laid_out, need_dtype
from outrider_runtimes.tensors import Array, TensorSpec

MAX_WORDS = 100_000
MAX_TOKENS = 8192
MAX_ID = 2**31 - 1

Number32 = Annotated[int, Whole(0, MAX_ID)]
_NO_PUNCTUATION = str.maketrans("", "", punctuation)


def encode_text(texts: Sequence[str], length: int | None = None) -> Array:
    """Texts as a tensor: their UTF-8, padded with zeros.

    Args:
        texts: without the character U+0000.
        length: bytes a row; as many as the longest text needs when left out, at least one.

    Returns:
        uint8 [N, T].

    Raises:
        InputError: a text is longer than ``length``, or has the character U+0000.
    """
    rows = [text.encode() for text in texts]
    size = max([1, *map(len, rows)]) if length is None else length
    for number, row in enumerate(rows):
        if len(row) > size or 0 in row:
            raise InputError(
                f"text {number} has {len(row)} bytes of UTF-8, expected at most {size} and none of zero",
                hint="cut it before the call",
            )
    return padded(rows, size)


@dataclass(frozen=True, kw_only=True)
class TokenLookup(StoredStep):
    """The words of a text as numbers: split at white space, one number a word, cut or padded to one length.

    Attributes:
        tensor: uint8 [N, T]: UTF-8 padded with zeros, see ``encode_text``. Becomes [N, length].
        vocabulary: the words; the one at position ``i`` has the number ``first_id + i``.
        length: words a row.
        lowercase: whether the text is made lower case first, as Python does.
        strip_punctuation: whether every ASCII punctuation character is deleted first: ``it's`` becomes ``its``.
        pad_id: the number after the last word.
        unknown_id: the number of a word that is not in the vocabulary.
        first_id: the number of the first word.
        dtype: int32 or int64.
    """

    kind: ClassVar[str] = "token_lookup"
    tensor: Name
    vocabulary: Annotated[tuple[str, ...], Many(Text(1, 256), 1, MAX_WORDS)]
    length: Annotated[int, Whole(1, MAX_TOKENS)]
    lowercase: Flag = True
    strip_punctuation: Flag = True
    pad_id: Number32 = 0
    unknown_id: Number32 = 1
    first_id: Number32 = 2
    dtype: Annotated[str, Choice(("int32", "int64"))] = "int32"

    def check(self) -> None:
        """See ``StoredStep``."""
        if len(self._numbers) != len(self.vocabulary):
            raise FormatError("vocabulary: a word is there twice")
        if self.first_id + len(self.vocabulary) - 1 > MAX_ID:
            raise FormatError(f"first_id: the last word's number is beyond {MAX_ID}")

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = laid_out(specs, self.tensor, "NT")
        need_dtype(spec, "uint8")
        last = self.first_id + len(self.vocabulary) - 1
        numbers = (self.pad_id, self.unknown_id, self.first_id, last)
        bounds = (float(min(numbers)), float(max(numbers)))
        made = replace(spec, dtype=self.dtype, shape=(spec.shape[0], self.length), range=bounds)
        return {**specs, self.tensor: made}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        texts = np.ascontiguousarray(tensors[self.tensor])
        tokens = np.full((len(texts), self.length), self.pad_id, self.dtype)
        numbers, unknown = self._numbers, self.unknown_id
        for number, (row, text) in enumerate(zip(tokens, texts, strict=True)):
            words = self._words(text.tobytes(), number)
            row[: len(words)] = [numbers.get(word, unknown) for word in words]
        return {**tensors, self.tensor: tokens}

    def _words(self, row: bytes, number: int) -> list[str]:
        stored = row.rstrip(b"\0")
        if b"\0" in stored:
            raise InputError(f"{self.tensor!r}: row {number} has a zero byte inside its text", tensor=self.tensor)
        try:
            text = stored.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.tensor!r}: row {number} is not UTF-8 at byte {error.start}", tensor=self.tensor
            ) from None
        if self.lowercase:
            text = text.lower()
        if self.strip_punctuation:
            text = text.translate(_NO_PUNCTUATION)
        return text.split(maxsplit=self.length)[: self.length]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: self.first_id + position for position, word in enumerate(self.vocabulary)}
