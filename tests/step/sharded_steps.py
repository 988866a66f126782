"""Steps on sharded arrays without `parallel=`; run by test_several_devices.py in a process with eight CPU devices."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jmp_train as jt
from jmp_train.testing import assert_one_compilation

EXPLICIT = jax.make_mesh((8,), ("data",))
AUTO = Mesh(EXPLICIT.devices, EXPLICIT.axis_names)
MESHES = pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
D = 512


def loss_fn(params, batch):
    out = (jnp.tanh(batch["x"] @ params["w1"]) @ params["w2"]).astype(jnp.float32)
    return jnp.mean((out - batch["y"]) ** 2)


def make(size, width=16, seed=0):
    rng = np.random.default_rng(seed)
    params = {"w1": rng.normal(size=(width, width)) / 4, "w2": rng.normal(size=(width, width)) / 4}
    batch = {"x": rng.normal(size=(size, width)), "y": rng.normal(size=(size, width))}
    return jax.tree.map(lambda x: x.astype(np.float32), (params, batch))


def gradients(params, batch):
    """Of `loss_fn`, in float64, by hand."""
    x, y, w1, w2 = (np.float64(a) for a in (batch["x"], batch["y"], params["w1"], params["w2"]))
    hidden = np.tanh(x @ w1)
    out = 2 * (hidden @ w2 - y) / y.size
    return {"w1": x.T @ (out @ w2.T * (1 - hidden**2)), "w2": hidden.T @ out}


def put(tree, mesh, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


def compiled(micro_batches, policy="float32"):
    params, batch = make(2048, D)
    stepper = jt.make_step(loss_fn, optax.sgd(0.1), policy, micro_batches=micro_batches)
    state = stepper.init(put(params, AUTO))
    return stepper.step.lower(state, put(batch, AUTO, "data")).compile()


def test_each_device_computes_its_share_of_every_micro_batch():
    # Two layers, forward and backward, without the gradient of x: 5 products of 2 x 2048 x D x D
    # FLOPs in all, an eighth of it on each device; XLA counts the body of a loop once. A tenth more is
    # for the rest.
    program = compiled(8)
    text = program.as_text() or ""
    share = 5 * 2 * 2048 * D * D / 8 / 8
    assert share < program.cost_analysis()["flops"] < 1.1 * share
    assert "all-gather" not in text and "all-to-all" not in text
    assert re.search(rf"f32\[32,{D}\]", text)  # 2048 / 8 parts / 8 devices
    # Gradients are summed over the devices, and nothing that is as large as a batch.
    moved = [line for line in text.splitlines() if re.search(r" all-reduce\(", line)]
    shapes = {shape for line in moved for shape in re.findall(r"f32\[([\d,]*)\]", line)}
    assert shapes <= {"", f"{D},{D}"}


@MESHES
@pytest.mark.parametrize("set_mesh", [False, True])
def test_micro_batches_of_a_sharded_batch_give_the_gradients_of_the_whole(mesh, set_mesh):
    params, batch = make(64)
    stepper = jt.make_step(loss_fn, optax.sgd(1.0), micro_batches=4)
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        state = stepper.init(put(params, mesh))
        state, _ = stepper.step(state, put(batch, mesh, "data"))
    for name, exact in gradients(params, batch).items():
        got = np.float64(params[name]) - np.float64(state.params[name])
        # Sums of at most 64 terms of size 1 / 1024, and the difference from a weight of size 1.
        np.testing.assert_allclose(got, exact, atol=2.0**-23)


def test_too_few_examples_for_the_devices_of_an_explicit_mesh_are_refused():
    params, batch = make(16)
    stepper = jt.make_step(loss_fn, optax.sgd(1.0), micro_batches=4)
    with pytest.raises(ValueError, match="16 examples, sharded over 8 devices; .* multiple of 32"):
        stepper.step(stepper.init(put(params, EXPLICIT)), put(batch, EXPLICIT, "data"))


@MESHES
@pytest.mark.parametrize("weights", [[1, 1, 0, 0], [1, 2, -2, 3], [1, 2, -2, -1]], ids=str)
def test_a_weighted_loss_over_devices_is_that_of_one_batch(mesh, weights):
    totals = np.arange(1.0, 17, dtype=np.float32)
    weights = np.repeat(np.float32(weights), 4)

    def weighted(params, batch):
        return jt.WeightedLoss((batch["t"] * params).sum(), batch["w"].sum())

    batch = {"t": totals, "w": weights}
    exact = totals.sum() / (weights.sum() or 1)
    on_two = Mesh(mesh.devices[:2], ("data",), axis_types=mesh.axis_types)
    for micro_batches in (1, 2):
        stepper = jt.make_step(
            weighted, optax.sgd(1.0), parallel=jt.DataParallel(on_two), micro_batches=micro_batches
        )
        state, info = stepper.step(stepper.init(jnp.float32(0)), batch)
        assert float(state.params) == pytest.approx(-exact, rel=8 * 2.0**-24)
    stepper = jt.make_step(weighted, optax.sgd(1.0), micro_batches=2)
    state, info = stepper.step(stepper.init(jnp.float32(1)), put(batch, on_two, "data"))
    assert float(info.loss) == pytest.approx(exact, rel=8 * 2.0**-24)


TWO_AXES = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@MESHES
@pytest.mark.parametrize("raw", [False, True], ids=["typed", "raw"])
def test_keys_and_model_state_beside_sharded_parameters_compile_once(mesh, raw):
    def noisy(params, batch, *, model_state, key):
        x = batch["x"] + jax.random.normal(key, batch["x"].shape)
        return loss_fn(params, {**batch, "x": x}), None, {"mean": batch["x"].mean(0)}

    params, batch = make(64)
    stepper = jt.make_step(noisy, optax.sgd(1e-3))
    state = stepper.init(
        put(params, mesh, "data"),
        model_state={"mean": jnp.zeros(16)},
        key=jax.random.PRNGKey(0) if raw else jax.random.key(0),
    )
    batch = put(batch, mesh, "data")
    with assert_one_compilation(stepper.step) as step:
        for _ in range(3):
            state, _ = step(state, batch)


@MESHES
@pytest.mark.parametrize(
    "policy,micro_batches", [("float32", 1), ("mixed_float16", 2), ("bf16", 1)]
)
def test_the_second_step_on_sharded_parameters_compiles_nothing(mesh, policy, micro_batches):
    params, batch = make(64)
    traced = []

    def counted(params, batch):
        traced.append(params)
        return loss_fn(params, batch)

    stepper = jt.make_step(
        counted, optax.adamw(1e-3), policy, micro_batches=micro_batches, ema_decay=0.9
    )
    state = stepper.init(put(params, mesh, "data"))
    batch = put(batch, mesh, "data")
    with assert_one_compilation(stepper.step) as step:
        for _ in range(3):
            state, _ = step(state, batch)
    assert len(traced) == 1
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {8}


OPTIMIZERS = {
    "sgd": (optax.sgd(0.1), ()),  # replicated parameters beside a batch sharded in two axes
    "lbfgs": (optax.lbfgs(), ("data",)),
    "adafactor": (optax.adafactor(1e-3, min_dim_size_to_factor=8), ("data",)),
}


@pytest.mark.parametrize("function", ["step", pytest.param("scan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_keeps_its_sharding_with_every_optimizer(name, function):
    optimizer, spec = OPTIMIZERS[name]
    params, batch = make(64)
    stepper = jt.make_step(loss_fn, optimizer)
    state = stepper.init(put(params, TWO_AXES, *spec))
    batch = put(batch, TWO_AXES, "data", "model")
    if function == "scan":
        batch = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    before = jax.tree.map(lambda x: x.sharding, state)
    with assert_one_compilation(getattr(stepper, function)) as step:
        for _ in range(3):
            state, _ = step(state, batch)
    assert before == jax.tree.map(lambda x: x.sharding, state)


def test_parameters_sharded_in_several_ways_compile_once():
    def with_bias(params, batch, *, model_state, key):
        noise = jax.random.normal(key, batch["x"].shape)
        x = batch["x"] + 0.1 * noise - model_state["mean"].astype(batch["x"].dtype)
        hidden = jnp.tanh(x @ params["w1"] + params["bias"])
        out = (hidden @ params["w2"] * params["scale"]).astype(jnp.float32)
        return jnp.mean((out - batch["y"]) ** 2), None, {"mean": batch["x"].mean(0)}

    params, batch = make(64)
    params = {
        "w1": put(params["w1"], TWO_AXES, None, "model"),
        "w2": put(params["w2"], TWO_AXES, "model", "data"),
        "bias": put(np.zeros(16, np.float32), TWO_AXES, "model"),
        "scale": put(np.float32(1), TWO_AXES),
    }
    stepper = jt.make_step(with_bias, optax.adamw(1e-3), "mixed_float16", ema_decay=0.9)
    state = stepper.init(params, model_state={"mean": jnp.zeros(16)}, key=jax.random.key(0))
    before = jax.tree.map(lambda x: x.sharding, state.params)
    batch = put(batch, TWO_AXES, "data")
    with assert_one_compilation(stepper.step) as step:
        for _ in range(3):
            state, _ = step(state, batch)
    after = jax.tree.map(lambda x: x.sharding, state.params)
    ranks = jax.tree.map(lambda x: x.ndim, state.params)
    assert all(
        jax.tree.leaves(
            jax.tree.map(lambda a, b, n: a.is_equivalent_to(b, n), before, after, ranks)
        )
    )


def test_another_sharding_is_named_as_the_cause_of_a_compilation():
    words = r"x/w: float32\[8\], on NamedSharding.*'data'.*, before float32\[8\], on NamedSharding"
    with (
        pytest.raises(AssertionError, match=words),
        assert_one_compilation(jax.jit(lambda x: x["w"] * 2)) as fn,
    ):
        for spec in ((), ("data",)):
            fn({"w": put(jnp.ones(8), AUTO, *spec)})
