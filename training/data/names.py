"""Names of a million files in little memory: joined to long texts, and where each ends."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

BLOCK = 1024
"""Names of one text. Texts of a fixed size leave no holes where memory that is given back is kept (`training.processor`)."""


class Names(Sequence[str]):
    """A list of short texts that does not change, at 4 bytes each beside their characters, where a list takes about 60.

    A process that is forked reads it without a write: no page of it is copied.

    Args:
        names: Read one by one, so that a generator may make them.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._texts: list[str] = []
        self._ends: list[array[int]] = []
        self._length = 0
        pending = iter(names)
        while some := list(itertools.islice(pending, BLOCK)):
            self._texts.append("".join(some))
            self._ends.append(array("I", itertools.accumulate(map(len, some))))
            self._length += len(some)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"name {index} of {self._length}")
        block, place = divmod(index % self._length, BLOCK)
        ends = self._ends[block]
        return self._texts[block][ends[place - 1] if place else 0 : ends[place]]

    def __iter__(self) -> Iterator[str]:
        for text, ends in zip(self._texts, self._ends, strict=True):
            start = 0
            for end in ends:
                yield text[start:end]
                start = end
