"""Optimizer state beside sharded parameters; run by test_several_devices.py with eight CPU devices."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jmp_train as jt
from jmp_train.optim import OptimizerConfig, make_optimizer

KINDS = {
    kind.name: jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    for kind in (AxisType.Auto, AxisType.Explicit)
}
SPECS = {"w": P("data", "model"), "b": P("data"), "norm": P("model")}
NARROW = {
    "master_weights": lambda: jt.optim.master_weights(optax.sgd(0.1, 0.9)),
    "bf16_remainder": lambda: jt.optim.bf16_remainder(optax.sgd(0.1, 0.9)),
    "stochastic_rounding": lambda: jt.optim.stochastic_rounding(optax.sgd(0.1, 0.9)),
    "kahan": lambda: jt.optim.kahan(optax.sgd(0.1, 0.9)),
    "loss_scaling": lambda: jt.optim.loss_scaling(jt.optim.kahan(optax.sgd(0.1, 0.9))),
}
OPTIMIZERS = {
    **NARROW,
    "fp32_state": lambda: jt.optim.fp32_state(optax.sgd(0.1, 0.9)),
    "accumulation": lambda: jt.optim.bf16_remainder(optax.MultiSteps(optax.sgd(0.1, 0.9), 2)),
    "state_in_bfloat16": lambda: make_optimizer(
        OptimizerConfig(state="bfloat16", max_grad_norm=None), steps=10
    ),
}
each_mesh = pytest.mark.parametrize(
    "mesh",
    [KINDS["Auto"], pytest.param(KINDS["Explicit"], marks=pytest.mark.slow)],
    ids=KINDS,
)


def sharded(mesh):
    """Parameters in bfloat16 and one in float32, each with its own sharding."""
    shapes = {"w": (16, 8), "b": (8,), "norm": (4,)}
    return {
        k: jax.device_put(
            jnp.ones(shape, jnp.float32 if k == "norm" else jnp.bfloat16),
            NamedSharding(mesh, SPECS[k]),
        )
        for k, shape in shapes.items()
    }


def assert_follows(tree, params):
    """Every array of a parameter's shape, three different ones here, lies as that parameter does."""
    by_shape = {p.shape: p.sharding for p in params.values()}
    arrays = [x for x in jax.tree.leaves(tree) if x.shape in by_shape]
    assert len(arrays) >= 2
    for x in arrays:
        assert x.sharding.is_equivalent_to(by_shape[x.shape], x.ndim), (x.shape, x.sharding)


@each_mesh
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_follows_the_parameters_sharding_at_init(name, mesh):
    params = sharded(mesh)
    assert_follows(OPTIMIZERS[name]().init(params), params)
    with jax.set_mesh(mesh):
        assert_follows(OPTIMIZERS[name]().init(params), params)


@each_mesh
@pytest.mark.parametrize("name", NARROW)
def test_what_the_wrapper_keeps_follows_under_jit(name, mesh):
    params = sharded(mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(NARROW[name]().init)(params)
    if mesh is KINDS["Explicit"]:
        return assert_follows(state, params)
    for part in (state.inner if name == "loss_scaling" else state)[1:]:
        if isinstance(part, dict):  # a key is no tree of the parameters
            assert_follows(part, params)


@each_mesh
@pytest.mark.parametrize("name", NARROW)
def test_updates_and_the_next_state_keep_the_sharding(name, mesh):
    params = sharded(mesh)
    optimizer = NARROW[name]()
    with jax.set_mesh(mesh):
        updates, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        after = jax.jit(optax.apply_updates)(params, updates)
    assert_follows((updates, state, after), params)


@each_mesh
def test_a_state_of_make_step_follows_too(mesh):
    stepper = jt.make_step(
        lambda p, b: p["w"].sum(), jt.optim.kahan(optax.sgd(0.1, 0.9)), "p=bf16,c=bf16"
    )
    params = sharded(mesh)
    with jax.set_mesh(mesh):
        state = stepper.init(params)
    assert_follows((state.params, state.opt_state), params)
