"""The report of a run that had to stop: what went non-finite first, and what to try."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jmp_train.debug import NonFiniteReport
from jmp_train.types import Json

_SHOWN = 6  # of each kind; the JSON holds all


@dataclasses.dataclass(frozen=True)
class Float32Gradients:
    """The gradients of the last batch, computed again in float32 and not scaled.

    Attributes:
      loss: the loss in float32.
      finite: whether all of them are finite.
      largest: their largest finite magnitude.
      count: how many numbers there are.
      format: the narrowest compute dtype of the run.
      shares: shares of them that underflow or overflow in that format at the loss scale; see
        `FormatShares`.
      shares_unscaled: the same without the scale.
      exponents: how many of them, unscaled, have which exponent, floor(log2 |x|).
    """

    loss: float
    finite: bool
    largest: float
    count: int
    format: str
    shares: dict[str, float]
    shares_unscaled: dict[str, float]
    exponents: dict[int, int]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The report on a run that diverged; `str()` of it is the text.

    Attributes:
      experiment: the name of the experiment.
      reason: why it was stopped.
      step: steps taken.
      policy: of the run.
      rules: of the run; empty without.
      loss_scale: the loss scale of the last step.
      skips: whether non-finite steps are skipped.
      history: the last train records, oldest first.
      gradients: the paths of the gradients that were not finite in the last skipped step, and under
        `model_state/` those of the model state that became so.
      parameters: the paths of the parameters that are not finite now.
      operations: the replay of the last step; None if the step could not be replayed.
      float32: the same step's gradients in float32; None if they could not be computed.
      problems: why something above is missing.
      advice: pairs of a reason and the options to give, in the order to try them.
      checkpoint: the step of the newest checkpoint; None without.
    """

    experiment: str
    reason: str
    step: int
    policy: str
    rules: tuple[str, ...]
    loss_scale: float
    skips: bool
    history: tuple[Json, ...]
    gradients: tuple[str, ...]
    parameters: tuple[str, ...]
    operations: NonFiniteReport | None
    float32: Float32Gradients | None
    problems: tuple[str, ...]
    advice: tuple[tuple[str, str], ...]
    checkpoint: int | None

    def __str__(self) -> str:
        lines = [self.reason]
        if self.gradients:
            lines.append(f"not finite in the last skipped step: {first_names(self.gradients)}")
        if self.parameters:
            lines.append(f"parameters that are not finite: {first_names(self.parameters)}")
        if self.operations is not None:
            lines += _operation_lines(self.operations)
        lines += _scale_lines(self.history, self.loss_scale)
        if self.float32 is not None:
            lines += _float32_lines(self.float32, self.loss_scale)
        lines += self.problems
        if self.advice:
            lines += ["to try:", *(f"  {options}\n      {why}" for why, options in self.advice)]
        there = "no checkpoint" if self.checkpoint is None else f"step {self.checkpoint}"
        lines.append(f"newest checkpoint: {there}; nothing was saved after it")
        return "\n".join(lines)

    def to_json(self) -> Json:
        """Return the report as JSON values."""
        return dataclasses.asdict(self) | {
            "advice": [{"why": why, "words": options} for why, options in self.advice]
        }


def _operation_lines(report: NonFiniteReport) -> list[str]:
    if not report.results:
        return ["run operation by operation the last step is finite: a rounding tips it over"]
    lines = [f"non-finite input: {first_names(report.arguments)}"] if report.arguments else []
    if report.ops:
        lines.append("the operations that went non-finite first, of the last step:")
        lines += [f"  {i}. {op}" for i, op in enumerate(report.ops[:_SHOWN], 1)]
        if len(report.ops) > _SHOWN:
            lines.append(f"  and {len(report.ops) - _SHOWN} more")
    return lines


def _scale_lines(history: Sequence[Json], last: float) -> list[str]:
    if all(record.get("loss_scale") == 1.0 for record in history):
        return []
    points = [f"{r['loss_scale']:g} at step {r['step']}" for r in history[-_SHOWN:]]
    return [f"loss scale: {', '.join(points)}" if points else f"loss scale: {last:g}"]


def _float32_lines(float32: Float32Gradients, scale: float) -> list[str]:
    if not float32.finite:
        return ["the gradients are not finite in float32 either: a wider format does not help"]
    shares = {k: v for k, v in float32.shares.items() if v}
    names = {"zero": "zero already", "flushed": "flushed to zero", "overflow": "above its largest"}
    parts = [f"{100 * v:.3g} % {names.get(k, k)}" for k, v in shares.items()]
    return [
        f"in float32 the loss is {float32.loss:.4g} and the gradients are finite, the largest "
        + f"{float32.largest:.3g}; times {scale:g}, in {float32.format}: {', '.join(parts)}"
    ]


def first_names(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are.

    >>> first_names(list("abcdefgh"))
    'a, b, c, d, e, f and 2 more'
    """
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
