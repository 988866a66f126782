"""What holds for each of the four ways with narrow parameters, around each optimizer."""

import functools
import json
from pathlib import Path

import chex
import flax.linen as nn
import flax.training.train_state
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.marks import slow

import jmp_train as jt
from jmp_train.config.experiment import Experiment
from jmp_train.data import DigitsConfig
from jmp_train.optim import OptimizerConfig, make_optimizer
from jmp_train.optim.optimizers import check_parameters
from jmp_train.records.checkpoints import Checkpoints
from tests.helpers.models import mlp

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("master", "remainder", "stochastic", "kahan")
NAMES = ("adamw", "adam", "sgd", "lion", "muon")
FUNCTIONS = (
    jt.optim.master_weights,
    jt.optim.bf16_remainder,
    jt.optim.stochastic_rounding,
    jt.optim.kahan,
)
each_way = pytest.mark.parametrize("way", WAYS)
slow_but_adamw = pytest.mark.parametrize(
    "name", ["adamw", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])]
)
each_optimizer = pytest.mark.parametrize("name", NAMES)


def start(dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(16, 12)), dtype),
        "b": jnp.asarray(rng.normal(size=12), dtype),
    }


def target(p):
    signs = np.random.default_rng(1).choice([-0.25, 0.25], p.shape)
    return np.asarray(p, np.float32) + np.float32(signs)


TARGET = jax.tree.map(target, start())


def loss_fn(params, batch):
    """A quadratic around TARGET, computed in float32."""
    apart = jax.tree.map(lambda p, t: p.astype(jnp.float32) - t, params, TARGET)
    return batch * sum(jnp.sum(x**2) for x in jax.tree.leaves(apart))


def config(name, way, **settings):
    settings = {"learning_rate": 1e-3, "schedule": "constant", "momentum": 0.0, **settings}
    return OptimizerConfig(name=name, parameters=way, **settings)


@functools.cache
def made_stepper(name, way, policy="bf16", **settings):
    optimizer = make_optimizer(config(name, way, **settings), steps=1000)
    return jt.make_step(loss_fn, optimizer, policy, skip_nonfinite=True)


def raw(tree):
    """Every leaf as bits, so that NaN equals itself and -0 differs from 0."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


# Training where bfloat16 alone stands still


@slow_but_adamw
@pytest.mark.slow
def test_bfloat16_stalls_and_each_of_the_four_ways_does_not(name):
    """Every parameter is to move by 0.25, up or down, in 800 steps of 1e-3 or less, below half of
    bfloat16's spacing near 1, 2^-9. The loss falls from 12.75 to, measured:

    | optimizer | direct | master, remainder | stochastic | kahan |
    | --- | --- | --- | --- | --- |
    | adamw, adam | 9.27 | 0.00039 | 0.00039 | 0.00039 |
    | sgd | 12.1 | 0.00039 | 0.00039 | 0.00039 |
    | lion | 8.27 | 0.0014 | 0.0031 | 0.0006 |
    | muon | 11.2 | 0.0011 | 0.015 | 0.0015 |

    where 0.0004 is what rounding the target itself to bfloat16 costs."""
    rate = {"sgd": 1.0, "muon": 2e-3}.get(name, 1e-3)
    settings = {"learning_rate": rate, "weight_decay": 0.0}
    if name == "sgd":
        settings["max_grad_norm"] = 5e-3  # a constant step of 5e-3 over 204 parameters
    params, batch = start(), jnp.ones(800)
    first = float(loss_fn(params, 1.0))
    last = {}
    for way in ("direct", *WAYS):
        stepper = made_stepper(name, way, **settings)
        state, _ = stepper.scan(stepper.init(params), batch)
        last[way] = float(loss_fn(state.params, 1.0))
    assert last["direct"] > 0.5 * first, last
    for way in WAYS:
        assert last[way] < 0.002 * first, last


# State


@each_way
@each_optimizer
def test_state_is_float32_but_for_what_the_way_keeps(name, way):
    params = start()
    made = make_optimizer(config(name, way), steps=10)
    state = made.init(params)
    assert {str(x.dtype) for x in jax.tree.leaves(state.inner)} <= {"float32", "int32"}
    kept = {
        "master": {"float32"}, "remainder": {"uint16"}, "kahan": {"bfloat16"},
        "stochastic": {"uint32"},
    }  # fmt: skip
    assert {str(x.dtype) for x in jax.tree.leaves(state[1])} == kept[way]
    updates, after = made.update(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, optax.apply_updates(params, updates))


@pytest.mark.parametrize("way,extra", [("direct", 0), ("master", 4), ("remainder", 2), ("kahan", 2), ("stochastic", 0)])  # fmt: skip
@pytest.mark.parametrize("name,moments", [("adamw", 8), ("adam", 8), ("sgd", 4), ("lion", 4)])
def test_bytes_per_parameter_of_the_arrays_themselves(name, moments, way, extra):
    params = {"w": jnp.zeros((256, 256), jnp.bfloat16)}
    state = make_optimizer(config(name, way, momentum=0.9), steps=10).init(params)
    size = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    # Counters and keys, 4 or 8 bytes each, are the only things that do not grow.
    assert 0 <= size - (2 + moments + extra) * 256**2 <= 32


@each_way
def test_a_skipped_step_leaves_what_the_way_keeps_bitwise(way):
    stepper = made_stepper("adamw", way)
    state = stepper.init(start())
    for _ in range(3):
        state, _ = stepper.step(state, jnp.float32(1))
    before = raw((state.params, state.opt_state))
    for bad in (np.nan, np.inf):
        state, info = stepper.step(state, jnp.float32(bad))
        assert not info.finite
        assert raw((state.params, state.opt_state)) == before
    state, info = stepper.step(state, jnp.float32(1))
    assert info.finite and raw(state.opt_state) != before


@pytest.mark.slow
@each_way
@slow_but_adamw
def test_scan_and_donated_steps_and_plain_optax_agree_bitwise(name, way):
    """`make_step`'s step and scan, and a loop by hand that jits `update` and calls
    `optax.apply_updates` on its result."""
    stepper = made_stepper(name, way)
    state = stepper.init(start())
    for _ in range(8):
        state, _ = stepper.step(state, jnp.float32(1))
    scanned, _ = stepper.scan(stepper.init(start()), jnp.ones(8))
    assert raw(scanned) == raw(state)

    optimizer = make_optimizer(config(name, way), steps=1000)
    params, opt_state = start(), optimizer.init(start())
    update, grad = jax.jit(optimizer.update), jax.jit(jax.grad(loss_fn))
    for _ in range(8):
        updates, opt_state = update(grad(params, jnp.float32(1)), opt_state, params)
        params = optax.apply_updates(params, updates)
    if way == "stochastic":  # a float32 sum that differs by its last bit may be drawn otherwise
        return
    # On a GPU two programs may round a product of bfloat16 numbers differently.
    rtol = 1e-5 if jax.default_backend() == "cpu" else 2**-8
    chex.assert_trees_all_close(opt_state.inner, state.opt_state.inner, rtol=rtol, atol=1e-7)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        apart = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32))
        assert (apart > 0).mean() < 0.02 and apart.max() < 0.02


@pytest.mark.slow
@each_way
def test_the_state_comes_back_from_orbax_bitwise(tmp_path, way):
    stepper, params = made_stepper("adamw", way), start()
    state = stepper.init(params)
    for _ in range(3):
        state, _ = stepper.step(state, jnp.float32(1))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, extra={}, metrics=None)
    checkpoints.close()
    restored = Checkpoints(tmp_path).restore_latest(stepper.init(params))
    assert restored is not None
    assert raw(restored.state) == raw(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored.state, state)
    one, _ = stepper.step(state, jnp.float32(1))
    other, _ = stepper.step(restored.state, jnp.float32(1))
    assert raw(one) == raw(other)


@each_way
def test_a_tree_with_float32_leaves_comes_back_from_orbax(tmp_path, way):
    params = {**start(), "norm": jnp.ones(3, jnp.float32)}
    state = make_optimizer(config("adamw", way), steps=10).init(params)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, extra={}, metrics=None)
    checkpoints.close()
    restored = Checkpoints(tmp_path).restore_latest(state)
    assert restored is not None and raw(restored.state) == raw(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)


# Other narrow dtypes


@pytest.mark.parametrize("dtype", [jnp.float16, slow(jnp.float8_e4m3fn)])
@pytest.mark.parametrize(
    "way", [jt.optim.master_weights, jt.optim.stochastic_rounding, jt.optim.kahan]
)
def test_small_updates_accumulate_in_float16_and_float8_parameters(way, dtype):
    """200 steps of 1e-4 (float16) or 5e-3 (float8), each below half a spacing at 1."""
    size = 1e-4 if dtype == jnp.float16 else 5e-3
    params = jnp.ones(2000, dtype)
    optimizer = way(optax.sgd(1.0))
    state = optimizer.init(params)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jnp.full(2000, -size), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=200))((params, state))
    got = np.asarray(params, np.float64)
    # Stochastic: the variance of a rounding is at most spacing^2 / 4, 200 of them, 2,000 elements.
    spacing = float(ml_dtypes.finfo(dtype).eps)
    noise = (
        5 * spacing / 2 * np.sqrt(200 / 2000) if way is jt.optim.stochastic_rounding else spacing
    )
    assert abs(got.mean() - (1 + 200 * size)) < noise
    assert np.asarray(jnp.ones((), dtype) + jnp.asarray(size, dtype)) == 1


# Other loops


@pytest.mark.parametrize("function", [jt.optim.bf16_remainder, jt.optim.kahan])
def test_the_training_states_of_flax_apply_the_updates_too(function):
    module = nn.Dense(3, param_dtype=jnp.bfloat16)
    params = module.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    grads = jax.tree.map(jnp.ones_like, params)
    optimizer = function(optax.adam(0.1))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    expected = optax.apply_updates(params, updates)

    linen = flax.training.train_state.TrainState.create(
        apply_fn=module.apply, params=params, tx=optimizer
    )
    chex.assert_trees_all_equal(linen.apply_gradients(grads=grads).params, expected)

    model = nnx.Linear(4, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel[...], np.float32)
    wrapped = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    nnx_grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    wrapped.update(model, nnx_grads)
    moved = np.asarray(model.kernel[...], np.float32) - before
    np.testing.assert_allclose(moved, -0.1, atol=0.01)
    assert model.kernel[...].dtype == jnp.bfloat16


@pytest.mark.parametrize("function", [jt.optim.bf16_remainder, jt.optim.stochastic_rounding])
def test_accumulation_and_skipping_inside_leave_the_parameters_alone(function):
    params = start()
    optimizer = function(optax.apply_if_finite(optax.MultiSteps(optax.adam(0.1), 2), 5))
    state = optimizer.init(params)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    moved = []
    for grads in (params, bad, params, params):
        updates, state = optimizer.update(grads, state, params)
        after = optax.apply_updates(params, updates)
        moved.append(raw(after) != raw(params))
        params = after
    assert moved == [False, False, True, False]


def test_partitions_and_injected_hyperparameters_work_around_it():
    params = start()
    make = lambda rate: jt.optim.kahan(optax.adam(rate))
    optimizer = optax.partition(
        {
            "a": optax.inject_hyperparams(make)(rate=0.1),
            "b": jt.optim.master_weights(optax.sgd(0.1)),
        },
        {"w": "a", "b": "b"},
    )
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    expected = np.asarray(params["b"], np.float32) * np.float32(0.9)
    np.testing.assert_allclose(np.asarray(after["b"], np.float32), expected, rtol=2**-8)
    assert raw(after["w"]) != raw(params["w"])


def test_extra_arguments_reach_the_inner_optimizer():
    seen = []

    def update(updates, state, params=None, *, value, **_):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    params = start()
    for function in FUNCTIONS:
        optimizer = function(inner)
        optimizer.update(params, optimizer.init(params), params, value=3)
    assert seen == [3] * 4


# The field of an experiment


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_field_is_checked_against_the_policy(way, dtype):
    fits = dtype == "bfloat16" or (dtype == "float16" and way != "remainder")
    if fits:
        return check_parameters(OptimizerConfig(parameters=way), dtype)
    with pytest.raises(ValueError, match=f"parameters is '{way}' .* in {dtype}; expected"):
        check_parameters(OptimizerConfig(parameters=way), dtype)
    with pytest.raises(ValueError, match=f"stores parameters in {dtype}"):
        policy = {"float32": "mixed_bfloat16", "float16": "16-true"}[dtype]
        Experiment(mlp(), DigitsConfig(), policy=policy, optimizer=OptimizerConfig(parameters=way))


def test_the_seed_of_a_run_is_the_seed_of_its_rounding():
    def params_after(seed):
        optimizer = make_optimizer(config("adamw", "stochastic"), steps=10, seed=seed)
        updates, _ = optimizer.update(start(), optimizer.init(start()), start())
        return raw(optax.apply_updates(start(), updates))

    assert params_after(0) == params_after(0) != params_after(1)


def test_the_table_of_the_docs_is_the_kept_result():
    kept = json.loads((ROOT / "benchmarks/results/parameters-cpu.json").read_text())["rows"]
    line = (
        "| {optimizer} | {parameters} | {bytes_per_parameter:.2f} | {train_loss:.4f} | "
        "{accuracy:.4f} | {time_over_float32:.2f} |"
    )
    page = (ROOT / "docs/parameters.md").read_text()
    assert all(line.format(**row) in page for row in kept)
    assert {row["parameters"] for row in kept} == {"float32", "direct", *WAYS}
    loss = {(row["optimizer"], row["parameters"]): row["train_loss"] for row in kept}
    for name in ("adamw", "lion", "sgd", "muon"):
        assert loss[name, "direct"] > 1.9 * loss[name, "float32"]
        assert all(
            loss[name, way] == pytest.approx(loss[name, "float32"], rel=0.01) for way in WAYS
        )
