"""Precision policies: their grammar, rules by module path, and both as one value."""

from jmp_train.policy.policy import POLICY_NAMES, Policy, get_policy
from jmp_train.policy.precision import Precision, default_loss_scale, get_precision
from jmp_train.policy.rules import Rules

__all__ = [
    "POLICY_NAMES",
    "Policy",
    "Precision",
    "Rules",
    "default_loss_scale",
    "get_policy",
    "get_precision",
]
