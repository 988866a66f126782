"""The MLP takes its policy as an argument; the same network in Linen trains the same way."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.marks import first_quick

import jmp_train as jt
from jmp_train import testing
from jmp_train.data import DigitsConfig
from jmp_train.models import Mlp
from jmp_train.tasks import make_task
from tests.helpers.models import mlp

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16", "bf16")


@testing.policies(*POLICIES)
def test_parameters_and_output_have_the_policys_dtypes(policy):
    policy = jt.get_policy(policy)
    dtypes = {"dtype": policy.compute_dtype, "param_dtype": policy.param_dtype}
    model = Mlp(64, 10, hidden=(32,), **dtypes, rngs=nnx.Rngs(0))
    assert all(x.dtype == policy.param_dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert model(jnp.ones((2, 64))).dtype == policy.compute_dtype


def test_no_hidden_layer_is_a_linear_map():
    model = Mlp(4, 3, hidden=(), rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    kernel, bias = (
        np.asarray(p[...], np.float64) for p in (model.layers[0].kernel, model.layers[0].bias)
    )
    np.testing.assert_allclose(model(x), x @ kernel + bias, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_dropout_drops_in_training_alone():
    task = make_task(
        mlp(hidden=(64,), dropout=0.5), "classification", DigitsConfig().load().spec, "f32"
    )
    params = task.init(jax.random.key(0))[0]
    batch = {"image": jnp.ones((8, 64)), "label": jnp.zeros(8, jnp.int32)}
    losses = [float(task.loss_fn(params, batch, key=jax.random.key(n))[0]) for n in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    still = [task.metrics_fn(params, batch)["loss"] for _ in range(2)]
    np.testing.assert_array_equal(*still)


@pytest.mark.parametrize("field,value", [("hidden", (0,)), ("dropout", 1.0), ("dropout", -0.1)])
def test_invalid_setting_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*expected"):
        make_task(mlp(**{field: value}), "classification", DigitsConfig().load().spec, "f32")


class LinenMlp(nn.Module):
    policy: jt.Policy

    @nn.compact
    def __call__(self, x):
        dtypes = {"dtype": self.policy.compute_dtype, "param_dtype": self.policy.param_dtype}
        x = nn.gelu(nn.Dense(32, **dtypes)(x))
        return nn.Dense(10, **dtypes)(x)


@pytest.mark.parametrize(
    "name", first_quick(["mixed_float16", "float32", "mixed_bfloat16", "bf16"])
)
def test_the_same_mlp_in_linen_trains_to_the_same_parameters(name):
    # One policy, imported into both libraries; both compile to the same arithmetic.
    policy = jt.get_policy(name)
    linen = LinenMlp(policy)
    task = make_task(mlp(hidden=(32,)), "classification", DigitsConfig().load().spec, policy)
    params = task.init(jax.random.key(0))[0]
    theirs = {f"Dense_{i}": dict(params["layers"][i]) for i in (0, 1)}
    reference = linen.init(jax.random.key(0), jnp.ones((1, 64)))["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(theirs, reference)

    def linen_loss(params, batch):
        logits = policy.cast_to_output(
            linen.apply({"params": params}, batch["image"].reshape(-1, 64))
        )
        return optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), batch["label"]
        ).mean()

    batch = DigitsConfig(noise=0.0).load().train.draw(np.arange(128), np.random.default_rng(0))
    results = []
    for loss_fn, start in ((task.loss_fn, params), (linen_loss, theirs)):
        stepper = jt.make_step(loss_fn, optax.adam(1e-2), policy)
        state = stepper.init(start)
        for _ in range(5):
            state, info = stepper.step(state, batch)
        results.append((float(info.loss), jax.tree.leaves(state.params)))
    assert results[0][0] == results[1][0]
    for ours, other in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(other, np.float32))
