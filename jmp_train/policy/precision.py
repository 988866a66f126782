"""The precision of a program as one value: a policy, or rules by module path."""

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
    """A policy, or rules that replace it, with the casts and the default loss scale that follow.

    Frozen and hashable, so static under jit. `get_precision` makes one from a string, for example.

    Attributes:
      policy: policy of the whole program, or a string for one; None if the loss function casts by
        itself.
      rules: policies by module path. `jmp_train.flax.apply_policy` applies them to the model, which
        then casts its own parameters, inputs and outputs. If there are rules, the casts of this
        value therefore return arrays unchanged.

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

    def __post_init__(self) -> None:
        if self.policy is not None:
            object.__setattr__(self, "policy", get_policy(self.policy))
        object.__setattr__(self, "rules", Rules(self.rules))

    @property
    def whole(self) -> Policy | None:
        """The policy of the casts below; None if the model or the loss function casts by itself."""
        return None if self.rules.entries else self.policy

    @property
    def as_rules(self) -> Rules:
        """The rules; without rules, one that gives every module the policy."""
        if self.rules.entries or self.policy is None:
            return self.rules
        return Rules(self.policy)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Every policy in use, without duplicates."""
        named = tuple(rule.policy for rule in self.rules.entries)
        given = named or ((self.policy,) if self.policy else ())
        return tuple(dict.fromkeys(given))

    @property
    def model(self) -> Policy:
        """The policy of the top-level module and of its outputs; float32 without a policy."""
        if self.rules.entries or self.policy is None:
            return self.rules.policy_of("")
        return self.policy

    def cast_to_param(self, tree: T) -> T:
        """Cast floating leaves to the parameter dtype of `whole`; see `cast_floating`."""
        return tree if self.whole is None else cast_floating(tree, self.whole.param_dtype)

    def cast_to_compute(self, tree: T) -> T:
        """Cast floating leaves to the compute dtype of `whole`; see `cast_floating`."""
        return tree if self.whole is None else cast_floating(tree, self.whole.compute_dtype)

    def default_loss_scale(self) -> LossScale:
        """Return the default loss scale; see the function `default_loss_scale`."""
        dtypes = {d for p in self.policies for d in (p.param_dtype, p.compute_dtype)}
        return DynamicLossScale(2.0**16) if _FLOAT16 in dtypes else NoOpLossScale()


def get_precision(
    policy: str | Policy | Rules | Iterable[Any] | Precision | None,
    rules: Iterable[Any] | Rules = NO_RULES,
) -> Precision:
    """Make a `Precision` from a policy string, a policy or rules.

    Args:
      policy: a string for `get_policy`, a `Policy`, `Rules` or a list of their entries, a `Precision`
        (returned unchanged), or None for a program that casts by itself.
      rules: `Rules`, or their entries; if there are any, they replace the policy.

    Raises:
      ValueError: for an unknown policy, a malformed rule, and rules given twice.
      TypeError: for a policy of another type.

    >>> get_precision("c=bf16").policy == get_policy("c=bf16")
    True
    """
    rules = Rules(rules)
    if isinstance(policy, (Precision, Rules, list, tuple)):
        if rules.entries:
            kind = type(policy).__name__
            raise ValueError(f"rules are given beside a {kind}; expected one or the other")
        return policy if isinstance(policy, Precision) else Precision(None, Rules(policy))
    if not (policy is None or isinstance(policy, (str, Policy))):
        raise TypeError(
            f"policy is {policy!r}; expected a string such as 'mixed_bfloat16', a Policy, Rules, a "
            "Precision, or None"
        )
    return Precision(None if policy is None else get_policy(policy), rules)


def default_loss_scale(policy: str | Policy | Rules | Precision) -> LossScale:
    """Return a dynamic loss scale if any policy in use has float16, else none.

    The defaults are those of PyTorch's GradScaler: the scale starts at 65,536, doubles after every
    2,000 finite steps in a row and halves on overflow.

    >>> default_loss_scale("mixed_bfloat16")
    NoOpLossScale()
    >>> float(default_loss_scale("mixed_float16").loss_scale)
    65536.0
    """
    return get_precision(policy).default_loss_scale()
