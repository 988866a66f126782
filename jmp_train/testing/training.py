"""Tests whether training in two precisions ends at the same result."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Equivalence(NamedTuple):
    """Result of two one-sided paired t-tests."""

    difference: float  # mean of the paired differences
    low: float  # its 90 % confidence interval
    high: float
    equivalent: bool  # whether that interval lies within the margin


def equivalence(ours: Sequence[float], reference: Sequence[float], *, margin: float) -> Equivalence:
    """Test whether two means are within a margin: two one-sided paired t-tests at 5 %.

    Args:
      ours: one value a seed, of any number type; they are compared in float64.
      reference: those of the same seeds.
      margin: the difference that does not matter; set it before the first run.

    Raises:
      ValueError: for fewer than two pairs, sequences of unequal lengths, values that are not finite,
        or a margin that is not positive and finite.

    >>> found = equivalence([0.91, 0.92, 0.90], [0.90, 0.92, 0.91], margin=0.02)
    >>> round(found.low, 4), round(found.high, 4), found.equivalent
    (-0.0169, 0.0169, True)

    Source: Schuirmann 1987, "A comparison of the two one-sided tests procedure and the power
    approach for assessing the equivalence of average bioavailability".
    """
    from scipy.special import stdtrit  # Student's t quantile; JAX depends on SciPy

    if len(ours) != len(reference) or len(ours) < 2:
        raise ValueError(f"{len(ours)} and {len(reference)} values; expected at least two pairs")
    _check_margin(margin)
    ours, reference = list(map(float, ours)), list(map(float, reference))
    if not (np.isfinite(ours).all() and np.isfinite(reference).all()):
        raise ValueError(f"the values are {ours} and {reference}; expected finite numbers")
    difference = np.subtract(ours, reference)
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    reach = float(stdtrit(len(difference) - 1, 0.95)) * error
    mean = float(difference.mean())
    low, high = float(mean - reach), float(mean + reach)
    return Equivalence(mean, low, high, bool(-margin < low and high < margin))


def assert_equivalent_training(
    make_run: Callable[[str, int], float],
    policies: Sequence[str] = ("float32", "mixed_bfloat16"),
    seeds: int | Iterable[int] = 5,
    *,
    margin: float,
) -> None:
    """Assert that training in two precisions ends at equivalent results, over several seeds.

    Two runs of one seed form a pair. The test passes if two one-sided paired t-tests at 5 % both
    reject a difference as large as the margin, that is, if the 90 % confidence interval of the mean
    difference lies within the margin. Few or noisy runs fail: no evidence of a difference is not
    evidence of equivalence. Pairs of equal numbers pass, also those of a run that ignores its policy.

    Args:
      make_run: `make_run(policy, seed)` trains and returns one number, such as an accuracy, or an array
        of one.
      policies: the reference and the policy to test.
      seeds: the seeds, all different, or how many from 0.
      margin: the difference that does not matter; set it before the first run.

    Raises:
      AssertionError: with means, difference, interval, margin and pairs, or the run whose number is
        not finite; if all runs of each policy give the same number, which is one pair and no evidence.
      ValueError: for other than two different policies, fewer than two seeds, a seed that occurs twice,
        or a margin that is not positive and finite.
      TypeError: if a run returns something else than one number.

    >>> def make_run(policy, seed):
    ...     return 0.9 + 0.001 * seed + (0.0005 * (-1) ** seed if policy == "float32" else 0)
    >>> assert_equivalent_training(make_run, margin=0.005)
    >>> assert_equivalent_training(make_run, margin=0.0005)
    Traceback (most recent call last):
    AssertionError: ...

    Source: Schuirmann 1987; see `equivalence`.
    """
    seeds = _seeds(seeds)
    if isinstance(policies, str) or len(policies) != 2 or policies[0] == policies[1]:
        raise ValueError(
            f"policies is {policies!r}; expected two different policies, such as ('float32', 'fp16')"
        )
    _check_margin(margin)
    reference, ours = ([_run(make_run, p, seed) for seed in seeds] for p in policies)
    found = equivalence(ours, reference, margin=margin)
    if found.equivalent and len(set(reference)) == len(set(ours)) == 1:
        raise AssertionError(
            "assert_equivalent_training: expected results that depend on the seed; found "
            f"{reference[0]:.5g} with {policies[0]} and {ours[0]:.5g} with {policies[1]} for each of "
            f"{len(seeds)} seeds"
        )
    if found.equivalent:
        return
    pairs = ", ".join(f"{a:.5g} and {b:.5g}" for a, b in zip(reference, ours, strict=True))
    raise AssertionError(
        f"assert_equivalent_training: expected {policies[1]} within {margin:g} of {policies[0]}; found "
        f"means {np.mean(ours):.5g} and {np.mean(reference):.5g}, a difference of "
        f"{found.difference:+.3g} with the 90 % confidence interval "
        f"[{found.low:+.3g}, {found.high:+.3g}]; pairs of {policies[0]} and {policies[1]}: {pairs}"
    )


def _seeds(seeds: int | Iterable[int]) -> list[int]:
    found = list(map(operator.index, seeds if isinstance(seeds, Iterable) else range(seeds)))
    if len(found) < 2 or len(set(found)) < len(found):
        raise ValueError(f"the seeds are {found}; expected at least two seeds, all different")
    return found


def _check_margin(margin: float) -> None:
    if not 0 < margin < math.inf:
        raise ValueError(f"margin is {margin}; expected a positive, finite number, such as 0.01")


def _run(make_run: Callable[[str, int], float], policy: str, seed: int) -> float:
    found: Any = make_run(policy, seed)
    try:
        result = float(found.item() if hasattr(found, "item") else found)
    except (TypeError, ValueError):
        shape = getattr(found, "shape", None)
        given = type(found).__name__ + (f" of shape {tuple(shape)}" if shape else "")
        raise TypeError(
            f"make_run returned {given} with policy {policy!r} and seed {seed}; expected one number"
        ) from None
    if not math.isfinite(result):
        raise AssertionError(
            f"assert_equivalent_training: expected finite results; found {result} with policy "
            f"{policy!r} and seed {seed}"
        )
    return result
