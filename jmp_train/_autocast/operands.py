"""The operands of a body as a flat list of arrays: each value in one or several dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jmp_train._autocast.kinds import Kind
from jmp_train._autocast.plans import Requests
from jmp_train._autocast.values import Arrays, Value, array_of_kind, value_of
from jmp_train._jaxpr.compat import Operand


class Operands:
    """Operands of a body, flattened: each value in one or several dtypes.

    Args:
      values: the operands of the equation.
      requests: per value, the dtypes that it is requested in; one that is not certain is added
        where the array exists in it already.
      copies: whether all but the base dtype go in as copies without a gradient.

    Attributes:
      args: the arrays.
      slots: per value, its kind and dtypes; None where it is not floating and has one array.
    """

    def __init__(
        self, values: Sequence[Operand], requests: Sequence[Requests], copies: bool = False
    ):
        self.args: list[Operand] = []
        self.slots: list[tuple[Kind, tuple[np.dtype, ...]] | None] = []
        self.copies = copies
        for value, requested in zip(values, requests, strict=True):
            if not isinstance(value, Value):
                self.args.append(value)
                self.slots.append(None)
                continue
            dtypes = self._dtypes(value, requested)
            base = value.kind.base
            get = value.arrays.copy if copies else value.get
            self.args += [value.get(d) if d == base else get(d) for d in dtypes]
            self.slots.append((value.kind, dtypes))

    def _dtypes(self, value: Value, requested: Requests) -> tuple[np.dtype, ...]:
        dtypes = [d for d, certain in requested.items() if certain]
        if not dtypes or self.copies:  # a copy needs what its gradient goes to
            dtypes = list(dict.fromkeys([value.kind.base, *dtypes]))
        dtypes += [d for d in requested if d not in dtypes and value.arrays.has(d)]
        return tuple(dtypes)

    def unflatten(self, args: Sequence[Operand]) -> list[Operand]:
        """Return the values again, from the arguments that the body received."""
        rest, values = iter(args), []
        for slot in self.slots:
            if slot is None:
                values.append(next(rest))
                continue
            kind, dtypes = slot
            got = {d: next(rest) for d in dtypes}
            if self.copies:
                own = {kind.base: got.pop(kind.base)}
                values.append(Value(kind, Arrays(kind.base, own, got)))
            else:
                base = kind.base if kind.base in got else dtypes[0]
                values.append(Value(kind, Arrays(base, got)))
        return values

    def per_argument(
        self, per_value: Sequence[Operand], extra: Callable[[Any], Any] = lambda entry: entry
    ) -> tuple[Any, ...]:
        """Return a parameter that has an entry per operand with one per argument.

        Args:
          per_value: the entries.
          extra: makes the entry of a further dtype from the operand's.
        """
        entries: list[Operand] = []
        for slot, entry in zip(self.slots, per_value, strict=True):
            if slot is None:
                entries.append(entry)
            else:
                kind, dtypes = slot
                entries += [entry if d == kind.base else extra(entry) for d in dtypes]
        return tuple(entries)

    def first_arguments(self) -> list[int]:
        """Return the index of each operand's first argument."""
        sizes = [1 if slot is None else len(slot[1]) for slot in self.slots]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    @property
    def key(self) -> Any:
        return (tuple(self.slots), self.copies)


class OperandGroups:
    """Groups of operands one after the other: the constants, carries and inputs of a loop."""

    def __init__(self, *groups: Operands):
        self.groups = groups

    def unflatten(self, args: Sequence[Operand]) -> list[Operand]:
        """Return the values of all groups, from the arguments that the body received."""
        values, start = [], 0
        for group in self.groups:
            values += group.unflatten(args[start : start + len(group.args)])
            start += len(group.args)
        return values

    @property
    def key(self) -> Any:
        return tuple(group.key for group in self.groups)


def carries(values: Sequence[Operand], kinds: Sequence[Kind | None]) -> Operands:
    """Return the first carries of a loop, in the dtypes that they keep."""
    carried = [value_of(k, array_of_kind(v, k)) for v, k in zip(values, kinds, strict=True)]
    return Operands(carried, [{k.base: True} if k else {} for k in kinds])
