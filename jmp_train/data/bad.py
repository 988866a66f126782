"""Examples that cannot be read: a run ends with the first one, or leaves them out and counts them.

A count and the first message travel with a batch, from the worker process that read it to the iterator
of the run, as arrays of fixed shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from jmp_train.data.dataset import DataError
from jmp_train.types import Batch, Json

OnBad = Literal["stop", "skip"]

#: The count in the state of an iterator.
SKIPPED = "skipped_examples"
_COUNT, _WHY = "\0bad", "\0why"  # names that no array of an example has
_LETTERS = 400  # bytes of the message that is kept
_IN_ROW = 100  # as many examples in a row that cannot be read end the run


@dataclasses.dataclass(frozen=True)
class Bad:
    """Examples that were left out."""

    count: int = 0
    why: str = ""
    """The message of the first."""

    @classmethod
    def of(cls, state: Json) -> Bad:
        """Return those of a state that `state` returned."""
        return cls(state.get(SKIPPED, 0))

    def state(self) -> Json:
        """Return the count as a part of an iterator's state: {} for none."""
        return {SKIPPED: self.count} if self.count else {}

    def and_(self, other: Bad) -> Bad:
        """Return these and later ones together."""
        return Bad(self.count + other.count, self.why or other.why)

    def marked(self, batch: Batch) -> Batch:
        """Return a batch with this beside its arrays."""
        why = np.frombuffer(self.why.encode()[:_LETTERS].ljust(_LETTERS, b"\0"), np.uint8)
        return {**batch, _COUNT: np.asarray(self.count, np.int32), _WHY: why}


def unmarked(item: Batch) -> tuple[Batch, Bad]:
    """Return a batch, or stacked batches, without what `Bad.marked` added; and that."""
    if _COUNT not in item:
        return item, Bad()
    counts = np.ravel(item[_COUNT])
    whys = np.reshape(item[_WHY], (len(counts), -1))
    text = bytes(whys[int((counts > 0).argmax())]).rstrip(b"\0").decode(errors="ignore")
    batch = {name: array for name, array in item.items() if name not in (_COUNT, _WHY)}
    return batch, Bad(int(counts.sum()), text)


def next_good(
    read: Callable[[int], Batch], index: int, size: int, why: str = ""
) -> tuple[Batch, Bad]:
    """Return the example with an index; if it cannot be read, the first after it that can be.

    The last example is followed by the first one.

    Args:
      read: returns the example with an index, or raises DataError.
      index: of the wanted example.
      size: number of examples.
      why: the message if the example itself is known to be bad; '' if not.

    Returns:
      The example, and the wanted one if that is bad; the others that are count when they are wanted.

    Raises:
      DataError: if too many in a row cannot be read.
    """
    tries = min(size, _IN_ROW)
    for offset in range(int(bool(why)), tries):
        try:
            return read((index + offset) % size), Bad(int(bool(why)), why)
        except DataError as error:
            why = why or str(error)
    raise too_many(tries, why)


def check_in_row(count: int, why: str) -> None:
    """Raise DataError for too many bad examples in a row."""
    if count >= _IN_ROW:
        raise too_many(count, why)


def too_many(count: int, why: str) -> DataError:
    """Return the error for so many bad examples in a row, with the message of the first."""
    return DataError(
        f"{count} examples in a row cannot be read, the first: {why}; expected on_bad=skip for single "
        "ones"
    )


class Skipped(Exception):
    """Examples of a stream were left out; the next ones can be read."""

    def __init__(self, bad: Bad):
        super().__init__(bad.why)
        self.bad = bad
