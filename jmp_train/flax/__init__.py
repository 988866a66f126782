"""Precision policies on Flax models, Linen and NNX, without changes to the models."""

from __future__ import annotations

from typing import Any, TypeVar

from flax import linen, nnx

from jmp_train.flax import _linen, _nnx, _wrapper
from jmp_train.flax._annotations import annotated_axes
from jmp_train.policy.precision import Precision
from jmp_train.policy.rules import Rules, RulesReport

M = TypeVar("M")

_EXPECTED = "an nnx.Module or a linen.Module, or an object whose .module is a linen.Module"

__all__ = ["annotated_axes", "apply_policy", "explain"]


def apply_policy(module: M, rules: Any) -> M:
    """Return a Flax model that computes in the dtypes of rules, without changes to its code.

    Under `autocast`, the matrix products and convolutions of each module run in the compute dtype
    of its policy; softmax, normalisation statistics, sums and losses run in float32. The outputs of
    a module have its compute dtype, so that activations take half the memory; scalars, such as an
    auxiliary loss, are not cast. The outputs of a module whose policy differs from its parent's are
    cast to its output dtype.

    Parameters are stored in the parameter dtype. Their names and shapes do not change, so
    checkpoints can be loaded with and without rules. A rule replaces a half-precision `dtype` of a
    layer.

    Args:
      module: an `nnx.Module`, a `linen.Module`, or an object whose attribute `module` is a
        `linen.Module`, such as a Flax model of Hugging Face.
      rules: `Rules`, a list of pairs (pattern, policy), one policy for the whole model, or a
        `Precision`.

    Returns:
      A module of a subclass of `type(module)`, with the same fields and methods. NNX: a copy with
      cast parameters, which can be split, merged and trained like the original. Linen: `init`
      returns cast parameters, and `apply` runs under the rules. Both trace at every call, so put
      `jax.jit` around the outermost function. An object with a module: a shallow copy of the same
      type, with its module under the rules and its `params` cast.

    Raises:
      ValueError: for unknown policies, and for a rule that matches no module, with nearest paths
        (Linen: at `init` or `apply`, when the modules are known).
      TypeError: for another type of module, and for an object whose `module` cannot be replaced.

    >>> import jax, jax.numpy as jnp
    >>> class Net(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.body, self.head = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.head(nnx.relu(self.body(x)))
    >>> net = apply_policy(Net(nnx.Rngs(0)), [("head", "float32"), ("**", "mixed_bfloat16")])
    >>> jaxpr = jax.make_jaxpr(lambda x: net(x))(jnp.ones((3, 4)))
    >>> [e.outvars[0].aval.dtype.name for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    ['bfloat16', 'float32']
    """
    rules = rules.as_rules if isinstance(rules, Precision) else Rules(rules)
    if isinstance(module, nnx.Module):
        return _nnx.apply_policy(module, rules)
    if isinstance(module, linen.Module):
        return _linen.apply_policy(module, rules)
    if _wrapper.carries_module(module):
        return _wrapper.apply_policy(module, rules)
    raise TypeError(f"apply_policy expects {_EXPECTED}, got {type(module)}")


def explain(module: Any, rules: Any, *args: Any, **kwargs: Any) -> RulesReport:
    """Return a report, for `print`, of the policy and the rule of each module.

    Args:
      module: as for `apply_policy`.
      rules: as for `apply_policy`.
      *args, **kwargs: arguments of a call (arrays or `jax.ShapeDtypeStruct`s), for Linen only,
        because a Linen model creates its modules when it is called.

    Raises:
      ValueError: for a rule that matches no module, with the nearest paths.

    >>> net = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.LayerNorm(2, rngs=nnx.Rngs(0)))
    >>> print(explain(net, [("layers/1", "float32"), ("**", "mixed_bfloat16")]))
    path      module      policy                rule
    (model)   Sequential  p=full,c=bf16,o=full  **
    layers    List        p=full,c=bf16,o=full  **
    layers/0  Linear      p=full,c=bf16,o=full  **
    layers/1  LayerNorm   p=full,c=full,o=full  layers/1
    """
    rules = rules.as_rules if isinstance(rules, Precision) else Rules(rules)
    module = module.module if _wrapper.carries_module(module) else module
    if isinstance(module, nnx.Module):
        return rules.explain(_nnx.modules_of(module))
    if isinstance(module, linen.Module):
        return rules.explain(_linen.modules_of(module, *args, **kwargs))
    raise TypeError(f"explain expects {_EXPECTED}, got {type(module)}")
