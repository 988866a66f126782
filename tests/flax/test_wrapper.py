"""Objects that carry a Linen module and its parameters, as Hugging Face's Flax models do."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.programs import result_dtypes

from jmp_train.flax import apply_policy, explain
from jmp_train.testing import assert_contractions_in

X = jax.random.normal(jax.random.key(0), (3, 4))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(nn.relu(nn.Dense(8, name="body")(x)))


class Pretrained:
    """The structure of transformers' FlaxPreTrainedModel: module and params behind properties."""

    def __init__(self, stats=False):
        self._module = Net()
        params = self._module.init(jax.random.key(1), X)["params"]
        self._params = (
            {"params": params, "batch_stats": {"mean": jnp.zeros(3)}} if stats else params
        )

    @property
    def module(self):
        return self._module

    @property
    def params(self):
        return self._params

    @params.setter
    def params(self, params):
        self._params = params

    def __call__(self, x, params=None):
        return self.module.apply({"params": self.params if params is None else params}, x)

    def generate(self, x):
        return jax.lax.fori_loop(0, 3, lambda _, x: self(x), x)


def test_calls_and_generate_run_under_the_rules():
    model = Pretrained()
    under = apply_policy(model, [("head", "float32"), ("**", "mixed_bfloat16")])
    assert type(under) is Pretrained and under is not model
    for run in (lambda m: m, lambda m: m.generate):
        # Two layers of order 1, three times at the most: a few units of 2^-8.
        np.testing.assert_allclose(run(under)(X), run(model)(X), atol=16 * 2**-8)
        jaxpr = jax.make_jaxpr(run(under))(X)
        assert result_dtypes(jaxpr) == {"bfloat16": 1, "float32": 1}
    assert_contractions_in(model, X, dtype="float32")


@pytest.mark.parametrize("stats", [False, True])
def test_its_parameters_are_stored_in_their_dtype(stats):
    model = Pretrained(stats)
    under = apply_policy(model, [("head", "float32"), ("**", "bf16")])
    tree = under.params["params"] if stats else under.params
    assert tree["body"]["kernel"].dtype == jnp.bfloat16
    assert tree["head"]["kernel"].dtype == jnp.float32
    others = (under.params["batch_stats"] if stats else {}, model.params)
    assert {x.dtype.name for x in jax.tree.leaves(others)} == {"float32"}


def test_a_wrapper_without_parameters_and_with_a_public_module():
    class Bare:
        def __init__(self):
            self.module = Net()

    variables = Net().init(jax.random.key(1), X)
    under = apply_policy(copy.copy(Bare()), "mixed_bfloat16")
    assert_contractions_in(under.module.apply, variables, X)


@dataclasses.dataclass(frozen=True)
class Frozen:
    module: nn.Module


class ReadOnly:
    def __init__(self):
        self.module, self._params = Net(), {}

    params = property(lambda self: self._params)


class Slots:
    __slots__ = ("module",)

    def __init__(self):
        self.module = Net()


@pytest.mark.parametrize("wrapper", [Frozen(Net()), ReadOnly(), Slots()], ids=type)
def test_a_wrapper_that_cannot_be_changed_is_answered_with_the_recipe(wrapper):
    with pytest.raises(TypeError, match=r"use apply_policy\(model.module, rules\) and call that"):
        apply_policy(wrapper, "mixed_bfloat16")


def test_explain_reads_the_module_of_a_wrapper():
    rows = explain(Pretrained(), "mixed_bfloat16", X).rows
    assert [row.path for row in rows] == ["", "body", "head"]


def test_a_linen_module_with_a_field_called_module_is_itself_the_model():
    class Outer(nn.Module):
        module: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.module(nn.Dense(4)(x))

    rows = explain(Outer(Net()), "mixed_bfloat16", X).rows
    assert [row.path for row in rows] == ["", "Dense_0", "module", "module/body", "module/head"]


def test_a_module_made_anew_at_each_read_is_refused_with_the_recipe():
    class Fresh:
        @property
        def module(self):
            return Net()

    with pytest.raises(TypeError, match=r"apply_policy\(model\.module, rules\)"):
        apply_policy(Fresh(), "mixed_bfloat16")
