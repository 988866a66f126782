"""Policies on Flax models that were not written for them, Linen and NNX."""

from __future__ import annotations

from typing import Any, TypeVar

from flax import linen, nnx

from jmp_train.flax import _linen, _nnx, _wrapper
from jmp_train.policy.rules import Rules, RulesReport

M = TypeVar("M")

_EXPECTED = "an nnx.Module or a linen.Module, or an object whose .module is a linen.Module"

__all__ = ["apply_policy", "explain"]


def apply_policy(module: M, rules: Any) -> M:
    """A Flax model that computes in the dtypes that rules give, without a change to its code.

    Every module runs with the matrix products and convolutions of its own code in its policy's
    compute dtype, and with softmax, normalisation statistics, sums and losses in float32, by
    `autocast`; what it returns is handed on in its compute dtype, so that activations between
    modules take half the memory (numbers without a shape, such as an auxiliary loss, excepted).
    Where a module's policy is not its parent's, its output is cast to its output dtype. Parameters
    are stored in the parameter dtype, under the names and shapes that they had, so checkpoints fit
    with and without rules. A half-precision `dtype` that the author gave a layer gives way to the
    rule.

    Args:
      module: an `nnx.Module`, a `linen.Module`, or an object that carries a `linen.Module` in its
        attribute `module`, such as a Flax model of Hugging Face.
      rules: `Rules`, a list of pairs for it, or one policy for the whole model.

    Returns:
      A module of a subclass of `type(module)`, with the same fields and methods. NNX: a copy, its
      parameters cast; it can be split, merged and trained like the one that was given. Linen:
      `init` returns cast parameters, and `apply` runs under the rules. Both trace at every call, so
      put `jax.jit` around the outermost function. An object with a module: a shallow copy of its
      own type, its module under the rules and its `params` cast.

    Raises:
      ValueError: for unknown policies; for a rule that matches no module, with the nearest paths
        (Linen: at `init` or `apply`, where the modules are known).
      TypeError: for what is neither, and for an object that does not store the module it carries.

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
    rules = Rules(rules)
    if isinstance(module, nnx.Module):
        return _nnx.apply_policy(module, rules)
    if isinstance(module, linen.Module):
        return _linen.apply_policy(module, rules)
    if _wrapper.carries_module(module):
        return _wrapper.apply_policy(module, rules)
    raise TypeError(f"apply_policy expects {_EXPECTED}, got {type(module)}")


def explain(module: Any, rules: Any, *args: Any, **kwargs: Any) -> RulesReport:
    """Which rule gives which module of a model its policy: `print` it.

    Args:
      module: as for `apply_policy`.
      rules: as for `apply_policy`.
      *args, **kwargs: Linen alone: what the model is called with (arrays or
        `jax.ShapeDtypeStruct`s), because a Linen model has its modules only when called.

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
    rules = Rules(rules)
    module = module.module if _wrapper.carries_module(module) else module
    if isinstance(module, nnx.Module):
        return rules.explain(_nnx.modules_of(module))
    if isinstance(module, linen.Module):
        return rules.explain(_linen.modules_of(module, *args, **kwargs))
    raise TypeError(f"explain expects {_EXPECTED}, got {type(module)}")
