"""The report of a replay: which operations went non-finite, and out of which operands."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class OperandRange(NamedTuple):
    """The values of one operand of an operation."""

    dtype: str
    smallest: float  # smallest finite value; NaN if none is finite
    largest: float
    argument: str  # the argument that it is, at most cast or reshaped; '' for none
    infinities: int = 0  # how many of its values are infinite
    nans: int = 0

    def __str__(self) -> str:
        if not np.isnan(self.smallest):
            return f"{self.dtype} [{self.smallest:.3g}, {self.largest:.3g}]"
        counts = [f"{self.infinities} infinite"] * bool(self.infinities)
        counts += [f"{self.nans} NaN"] * bool(self.nans)
        return f"{self.dtype} [{'no finite value: ' + ', '.join(counts) if counts else 'no value'}]"


@dataclasses.dataclass(frozen=True)
class NonFiniteOp:
    """One operation that made infinities or NaNs.

    Attributes:
      op: the primitive's name, such as `"dot_general"`.
      kind: `"overflow"` (the result is finite in a wider format), `"nan"` or `"inf"`.
      dtype: of the result, such as `"float16"`.
      shape: of the result.
      count: how many of its values are not finite.
      backward: whether it belongs to a backward pass.
      module: its place in the model: its name scope (Linen puts the module's path there), else the
        path of an argument that it reads or whose gradient it is, else `"after "` and the last
        argument that was read before it.
      path: the bodies that contain it, outermost first, such as `"scan[3]/jit:gelu"`; a number is
        the iteration, from 0.
      source: file and line of the code that wrote it, outside Flax and JAX.
      operands: the range of each floating operand.
      wide: the largest magnitude that the result has in the wider format; None where it is not
        finite there either, or the operation could not be run in one.
      reaches: the results of the function that it made non-finite.
    """

    op: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    backward: bool
    module: str
    path: str
    source: str
    operands: tuple[OperandRange, ...]
    wide: float | None
    reaches: tuple[str, ...]

    @property
    def largest_input(self) -> float:
        """The largest finite magnitude among the operands; 0 without any."""
        ends = [abs(end) for o in self.operands for end in (o.smallest, o.largest)]
        return max((end for end in ends if not np.isnan(end)), default=0.0)

    def __str__(self) -> str:
        direction = "backward" if self.backward else "forward"
        where = " of ".join(filter(None, (self.path, self.module)))
        ranges = ", ".join(map(str, self.operands))
        if self.kind == "overflow":
            limit = float(jnp.finfo(self.dtype).max)
            wider = f"; {self.wide:.3g} in {wider_dtype(self.dtype).name}" if self.wide else ""
            cause = f"overflow of {self.dtype} (largest {limit:.5g}{wider})"
        else:
            cause = f"{ {'nan': 'NaN', 'inf': 'infinity'}[self.kind] } in {self.dtype}"
        size = int(np.prod(self.shape, dtype=np.int64))
        return (
            f"{self.op} ({direction}{', ' + where if where else ''}): {cause}, {self.count} of {size} "
            f"values, from {ranges or 'no floating operand'}; {self.source}"
        )


@dataclasses.dataclass(frozen=True)
class NonFiniteReport:
    """The findings of `first_nonfinite`; `str()` of it is a line for each finding.

    Attributes:
      results: the results that are not finite, by path; empty where all are finite.
      arguments: the arguments that are not finite themselves and led to them; where nothing else
        did, `"a constant"`: of the function's code, an array that it closes over, or a plain number.
      ops: the operations that led to them out of finite numbers, in the order in which they ran. If
        there is none, those that made a NaN out of infinities that the function was given; and if
        there is none of these and no argument, those that read a constant that is not finite.
    """

    results: tuple[str, ...]
    arguments: tuple[str, ...]
    ops: tuple[NonFiniteOp, ...]

    def __str__(self) -> str:
        if not self.results:
            return "every result is finite"
        given = [f"non-finite input: {name}" for name in self.arguments]
        return "\n".join([*given, *map(str, self.ops)])


def wider_dtype(dtype: Any) -> np.dtype:
    """Return the format that tells an overflow from an infinity: float32 for 16 bits or fewer."""
    return np.dtype(np.float32 if jnp.finfo(dtype).bits < 32 else np.float64)
