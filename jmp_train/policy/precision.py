"""The precision of a whole program: a policy, or rules over a model's modules, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

from jmp_train.loss_scales.states import DynamicLossScale, LossScale, NoOpLossScale
from jmp_train.policy.policy import Policy, get_policy
from jmp_train.policy.rules import NO_RULES, Rules
from jmp_train.tree import cast_floating

T = TypeVar("T")

_FLOAT16 = np.dtype(np.float16)


@dataclasses.dataclass(frozen=True)
class Precision:
    """A policy, or rules that replace it, with what they do to the arrays around a loss function.

    Frozen and hashable, so static under jit. `get_precision` makes one from what users write.

    Attributes:
      policy: the policy of the whole program; None where the loss function casts by itself.
      rules: policies by module path. Where there are any, `jmp_train.flax.apply_policy` puts them
        on the model, which then casts its own parameters, inputs and outputs; so the casts of this
        value leave arrays alone.

    >>> precision = get_precision("mixed_float16")
    >>> float(precision.default_loss_scale().loss_scale)
    65536.0
    >>> rules = Rules([("**/norm*", "float32"), ("**", "mixed_float16")])
    >>> get_precision(rules).default_loss_scale() == precision.default_loss_scale()
    True
    >>> get_precision(None).default_loss_scale()
    NoOpLossScale()
    """

    policy: Policy | None
    rules: Rules = NO_RULES

    @property
    def whole(self) -> Policy | None:
        """The policy that the program casts by; None where the model or the loss casts by itself."""
        return None if self.rules.entries else self.policy

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Every policy that is in use, without repetition."""
        named = tuple(rule.policy for rule in self.rules.entries)
        given = named or ((self.policy,) if self.policy else ())
        return tuple(dict.fromkeys(given))

    @property
    def model(self) -> Policy:
        """The policy of the model itself, whose output dtype its outputs have; float32 for None."""
        if self.rules.entries or self.policy is None:
            return self.rules.policy_of("")
        return self.policy

    def cast_to_param(self, tree: T) -> T:
        """Cast floating leaves to the parameter dtype of the whole program; see `cast_floating`."""
        return tree if self.whole is None else cast_floating(tree, self.whole.param_dtype)

    def cast_to_compute(self, tree: T) -> T:
        """Cast floating leaves to the compute dtype of the whole program; see `cast_floating`."""
        return tree if self.whole is None else cast_floating(tree, self.whole.compute_dtype)

    def default_loss_scale(self) -> LossScale:
        """Return the loss scale that is needed: see the function `default_loss_scale`."""
        dtypes = {d for p in self.policies for d in (p.param_dtype, p.compute_dtype)}
        return DynamicLossScale(2.0**16) if _FLOAT16 in dtypes else NoOpLossScale()


def get_precision(
    policy: str | Policy | Rules | Precision | None, rules: Iterable[Any] | Rules = NO_RULES
) -> Precision:
    """Parse what users write for a precision, once.

    Args:
      policy: a string for `get_policy`, a `Policy`, `Rules`, a `Precision` (returned as it is), or
        None for a program that casts by itself.
      rules: `Rules`, or entries for them; where there are any, they replace the policy.

    Raises:
      ValueError: for an unknown policy or a malformed rule.
      TypeError: for a policy of another type.

    >>> get_precision("c=bf16").policy == get_policy("c=bf16")
    True
    """
    if isinstance(policy, Precision):
        return policy
    if isinstance(policy, Rules):
        return Precision(None, policy)
    return Precision(None if policy is None else get_policy(policy), Rules(rules))


def default_loss_scale(policy: str | Policy | Rules | Precision) -> LossScale:
    """Return what a precision needs: dynamic from 2^16 where float16 is used, else none.

    The numbers are GradScaler's: 65,536, doubled every 2,000 finite steps, halved on overflow.

    >>> default_loss_scale("mixed_bfloat16")
    NoOpLossScale()
    >>> float(default_loss_scale("mixed_float16").loss_scale)
    65536.0
    """
    return get_precision(policy).default_loss_scale()
