"""Steps on eight devices in several meshes; test_several_devices.py runs this file in a process with them.

The oracle is the same step on one device. Sums over the devices have another order, so values differ by
roundings: a bound is a number of units of the dtype, times the size of what is summed.
"""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marks import first_quick, slow
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jmp_train as jt
from jmp_train.sharding import AXES, Placement, Sharded, make_mesh

B, D, H, DEPTH = 48, 16, 64, 3
MESHES = ["data=2,fsdp=4", "data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"]
TENSOR = Placement(["up/kernel=-,tensor", "layers/in=-,tensor", "layers/out=tensor,-"])


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: np.float32(rng.normal(size=shape) / np.sqrt(shape[-2]))
    return {
        "up": {"kernel": draw(D, H), "bias": np.zeros(H, np.float32)},
        "layers": {"in": draw(DEPTH, H, 2 * H), "out": draw(DEPTH, 2 * H, H)},
        "down": draw(H, 1),
    }


def batch_of(size=B, seed=1):
    rng = np.random.default_rng(seed)
    return {
        "x": np.float32(rng.normal(size=(size, D))),
        "y": np.float32(rng.normal(size=size)),
    }


def outputs(params, x, *, dtype=jnp.float32, remat=False):
    """A network that casts its own parameters, as Flax's layers do, in a scan over its layers."""
    cast = lambda p: p.astype(dtype)
    h = x.astype(dtype) @ cast(params["up"]["kernel"]) + cast(params["up"]["bias"])

    def layer(h, kernels):
        inner = jnp.tanh(h @ cast(kernels["in"]))
        return h + inner @ cast(kernels["out"]), None

    layer = jax.checkpoint(layer) if remat else layer
    h, _ = jax.lax.scan(layer, h, params["layers"])
    return (h @ cast(params["down"]))[:, 0].astype(jnp.float32)


def loss_of(**options):
    def loss_fn(params, batch):
        return jnp.mean((outputs(params, batch["x"], **options) - batch["y"]) ** 2)

    return loss_fn


def sharded(mesh, **options):
    return Sharded(make_mesh(mesh), TENSOR, **options)


def losses(stepper, params, steps=6, **options):
    state, found = stepper.init(params, **options), []
    for i in range(steps):
        state, info = stepper.step(state, batch_of(seed=i))
        found.append(float(info.loss))
    return np.array(found), state


@pytest.mark.parametrize("mesh", first_quick(MESHES))
@pytest.mark.parametrize(
    "policy,tolerance",
    # Losses of about 1 after six steps: some dozens of roundings of 2^-24, 2^-11, 2^-8.
    [slow("float32", 2e-5), ("mixed_float16", 6e-3), slow("mixed_bfloat16", 4e-2)],
)
def test_a_mesh_trains_as_one_device(mesh, policy, tolerance):
    # Not adam, which divides a gradient of roundings alone by its own size.
    optimizer = optax.sgd(0.02, momentum=0.9)
    options = {"ema_decay": 0.9, "micro_batches": 2, "grad_norm": True}
    alone, one = losses(jt.make_step(loss_of(), optimizer, policy, **options), parameters())
    stepper = jt.make_step(loss_of(), optimizer, policy, parallel=sharded(mesh), **options)
    shared, many = losses(stepper, parameters())
    np.testing.assert_allclose(shared, alone, rtol=tolerance)
    assert alone[0] != alone[-1]
    for a, b in zip(
        jax.tree.leaves(one.eval_params), jax.tree.leaves(many.eval_params), strict=True
    ):
        assert np.abs(a - b).max() <= 10 * tolerance * np.abs(a).max()
    if policy == "mixed_float16":
        assert int(many.skipped) == int(one.skipped)
        assert float(many.loss_scale.loss_scale) == float(one.loss_scale.loss_scale)


def test_state_lies_where_its_parameters_do_from_the_start_and_nothing_compiles_again():
    counted = chex.assert_max_traces(n=1)(loss_of(dtype=jnp.bfloat16))
    chex.clear_trace_counter()
    own = sharded("data=2,fsdp=2,tensor=2")
    optimizer = jt.optim.bf16_remainder(optax.adam(1e-2))
    stepper = jt.make_step(
        counted, optimizer, "params=bfloat16,compute=bfloat16,output=float32",
        parallel=own, ema_decay=0.9, loss_scale=jt.DynamicLossScale(2.0**7),
    )  # fmt: skip
    state = stepper.init(parameters())
    wanted = own.shardings(state.params)
    assert wanted["layers"]["in"].spec == P(None, "fsdp", "tensor")
    specs = lambda tree: [x.sharding.spec for x in jax.tree.leaves(tree) if x.ndim > 1]
    for _ in range(3):
        split = specs(state.params)
        assert split == [s.spec for s in jax.tree.leaves(wanted) if len(s.spec) > 1]
        found = specs(state.opt_state)
        assert found == split * (len(found) // len(split)) and len(found) >= 3 * len(split)
        assert specs(state.ema) == split
        rest = (state.step, state.loss_scale, state.skipped, state.last_skip)
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(rest))
        state, _ = stepper.step(state, batch_of())


def test_eight_devices_hold_an_eighth_each():
    """Of parameters and the state of adam; what no axis of 8 divides, the bias alone, is a 64th."""
    stepper = jt.make_step(loss_of(), optax.adam(1e-2), parallel=Sharded(make_mesh("fsdp=8")))
    state = stepper.init(parameters())
    arrays = jax.tree.leaves((state.params, state.opt_state))
    for device in jax.devices():
        held = sum(
            s.data.nbytes for x in arrays for s in x.addressable_shards if s.device == device
        )
        assert held <= 1.05 * sum(x.nbytes for x in arrays) / 8


def test_one_overflow_skips_the_step_on_all_devices_and_lowers_one_scale():
    stepper = jt.make_step(
        loss_of(), optax.adam(1e-2), "mixed_float16",
        loss_scale=jt.DynamicLossScale(2.0**10), parallel=sharded("data=2,fsdp=4"),
    )  # fmt: skip
    state = stepper.init(parameters())
    state, info = stepper.step(state, batch_of())
    assert info.finite
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    bad = batch_of()
    bad["x"][21] = 6e4  # on one device
    state, info = stepper.step(state, bad)
    assert not info.finite and int(state.skipped) == 1
    for scale in state.loss_scale.loss_scale.addressable_shards:
        assert scale.data == 2.0**9
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, (state.params, state.opt_state)))


def text_of(policy="float32", mesh="data=2,fsdp=4", *, reduce_dtype=None, **options):
    own = sharded(mesh, reduce_dtype=reduce_dtype)
    stepper = jt.make_step(loss_of(**options), optax.adam(1e-2), policy, parallel=own)
    state = stepper.init(parameters())
    batch = jax.device_put(batch_of(), NamedSharding(own.mesh, P(AXES[:2])))
    return stepper.step.lower(state, batch).compile().as_text()


def collectives(text, kind):
    """Shapes, with their dtype, that collectives of a kind return."""
    lines = re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)
    return [shape for line in lines for shape in re.findall(r"\w+\[[\d,]+\]", line)]


def test_parameters_are_gathered_in_the_dtype_of_the_compute_once():
    text = text_of(dtype=jnp.bfloat16)
    gathered = [s for s in collectives(text, "all-gather") if "," in s]
    # On a CPU, XLA computes products in float32 and may take the cast back before the gather is
    # written; what a GPU and a TPU gather is tested where their programs are compiled.
    sizes = [np.prod([int(n) for n in re.findall(r"\d+", s.partition("[")[2])]) for s in gathered]
    bias = H  # as it is added to a batch, with an axis of size 1
    assert sorted(sizes) == sorted([D * H, bias, H * 2 * H, 2 * H * H, H])


@pytest.mark.slow
def test_with_remat_a_layer_is_gathered_again():
    plain, again = (
        len([s for s in collectives(text_of(remat=remat), "all-gather") if f"{2 * H}" in s])
        for remat in (False, True)
    )
    assert (plain, again) == (2, 4)


@pytest.mark.slow
def test_activations_stay_on_their_device():
    text = text_of()
    for kind in ("all-to-all", "collective-permute"):
        assert collectives(text, kind) == []
    for kind in ("all-gather", "all-reduce", "reduce-scatter"):
        for shape in collectives(text, kind):
            assert not re.search(rf"\b({B}|{B // 8}|{B // 4}|{B // 2})\b", shape), shape


@pytest.mark.parametrize("reduce_dtype,bits", [("float32", 2.0**-22), (None, 2.0**-7)])
def test_gradients_are_summed_in_the_dtype_that_is_asked_for(reduce_dtype, bits):
    """In float32, the gradient of a bfloat16 product is that of its rounded operands, in float64."""

    def loss_fn(params, batch):
        out = batch["x"].astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)
        return jnp.sum(out.astype(jnp.float32) * batch["g"])

    rng = np.random.default_rng(0)
    round_ = lambda x: np.float32(jnp.asarray(x, jnp.bfloat16))
    batch = {"x": round_(rng.normal(size=(64, D))), "g": round_(rng.normal(size=(64, H)))}
    own = Sharded(make_mesh("data=2,fsdp=4"), reduce_dtype=reduce_dtype)
    stepper = jt.make_step(loss_fn, optax.sgd(1.0), None, parallel=own)
    state, _ = stepper.step(stepper.init({"w": np.zeros((D, H), np.float32)}), batch)
    exact = np.float64(batch["x"]).T @ np.float64(batch["g"])
    size = np.abs(np.float64(batch["x"])).T @ np.abs(np.float64(batch["g"]))
    error = np.abs(np.float64(state.params["w"]) + exact) / size
    assert error.max() <= bits
    assert reduce_dtype or error.max() > 2.0**-12  # it was narrow


@pytest.mark.parametrize("reduce_dtype", [slow(None), "float32"])
def test_gathering_changes_no_value_on_one_shard(reduce_dtype):
    """The same program but for the gathers, on a mesh whose fsdp axis has the eight devices."""
    params, batch = parameters(), batch_of()
    own = Sharded(make_mesh("fsdp=8"), reduce_dtype=reduce_dtype)
    loss = loss_of(remat=True)
    alone, grads = jax.jit(jax.value_and_grad(loss))(params, batch)
    placed = jax.device_put(params, own.shardings(params))
    shared, found = jax.jit(jax.value_and_grad(own.gathering(loss)))(placed, batch)
    np.testing.assert_allclose(shared, alone, rtol=2.0**-20)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, atol=2.0**-18 * np.abs(a).max(), rtol=2.0**-18)


@pytest.mark.slow
def test_a_mean_over_the_batch_is_that_of_all_devices():
    """As of BatchNorm, whose statistics are a part of the model state."""

    def loss_fn(params, batch, *, model_state):
        h = batch["x"] @ params["up"]["kernel"]
        mean, var = h.mean(0), h.var(0)
        new = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, model_state, {"mean": mean, "var": var})
        out = ((h - mean) * jax.lax.rsqrt(var + 1e-5)) @ params["down"]
        return jnp.mean((out[:, 0] - batch["y"]) ** 2), None, new

    statistics = {"mean": np.zeros(H, np.float32), "var": np.ones(H, np.float32)}
    found = []
    for own in (None, sharded("data=2,fsdp=4")):
        stepper = jt.make_step(loss_fn, optax.sgd(0.1), parallel=own)
        _, state = losses(stepper, parameters(), steps=3, model_state=statistics)
        found.append(jax.device_get((state.model_state, state.params)))
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_dropout_draws_the_same_units_on_any_mesh():
    def loss_fn(params, batch, *, key):
        kept = jax.random.bernoulli(key, 0.5, batch["x"].shape)
        loss = jnp.mean((outputs(params, batch["x"] * kept) - batch["y"]) ** 2)
        return loss, kept.sum()

    found = []
    for mesh in (None, "data=8", "data=2,fsdp=4"):
        own = None if mesh is None else sharded(mesh)
        stepper = jt.make_step(loss_fn, optax.sgd(0.0), parallel=own)
        state = stepper.init(parameters(), key=jax.random.key(3))
        _, info = stepper.step(state, batch_of())
        found.append((int(info.aux), float(info.loss)))
    assert found[0][0] == found[1][0] == found[2][0]
    np.testing.assert_allclose([loss for _, loss in found], found[0][1], rtol=2.0**-20)


@pytest.mark.slow
def test_a_rule_that_does_not_fit_is_an_error_of_init():
    own = Sharded(make_mesh("fsdp=8"), Placement(["up/bias=fsdp", "down=fsdp,tensor"]))
    stepper = jt.make_step(loss_of(), optax.sgd(0.1), parallel=own)
    stepper.init(parameters())
    own = Sharded(make_mesh("fsdp=4,tensor=2"), Placement(["down=fsdp,tensor"]))
    with pytest.raises(ValueError, match="'down', of shape .64, 1.: 1 is not a multiple of tensor"):
        jt.make_step(loss_of(), optax.sgd(0.1), parallel=own).init(parameters())


@pytest.mark.parametrize("reduce_dtype", [None, "float32"])
def test_complex_parameters_keep_their_imaginary_gradient(reduce_dtype):
    loss_fn = lambda params, batch: jnp.mean(jnp.abs(batch["x"] * params) ** 2)
    own = Sharded(make_mesh("fsdp=8"), reduce_dtype=reduce_dtype)
    stepper = jt.make_step(loss_fn, optax.sgd(1.0), parallel=own)
    state, _ = stepper.step(stepper.init(np.full(8, 1 + 2j, np.complex64)), {"x": np.ones((16, 8))})
    np.testing.assert_allclose(state.params, 0.75 + 2.5j)


def test_each_cast_of_a_parameter_rounds_it():
    """To float16, where it overflows, and only then to bfloat16."""
    twice = lambda p: p.astype(jnp.float16).astype(jnp.bfloat16).astype(jnp.float32)
    found = jax.jit(Sharded(make_mesh("fsdp=8")).gathering(twice))(jnp.full(8, 1e5))
    assert np.isinf(found).all()


def test_sums_of_a_policy_reach_the_parameters_as_they_are():
    """Integers that float32 holds and bfloat16 does not; products of small ones, which it does."""
    loss_fn = lambda p, b: jnp.sum(
        (b["x"] @ p).astype(jnp.float32) * b["x"][:, :1].astype(jnp.float32)
    )
    x = np.float32(np.arange(1024 * 8).reshape(1024, 8) % 7 + 1)
    own = Sharded(make_mesh("fsdp=8"), reduce_dtype="float32")
    stepper = jt.make_step(loss_fn, optax.sgd(1.0), "mixed_bfloat16", parallel=own)
    state, _ = stepper.step(stepper.init(np.zeros((8, 8), np.float32)), {"x": x})
    np.testing.assert_array_equal(state.params[:, 0], -(x.T @ x[:, 0]))


def test_a_batch_may_have_numbers_and_has_to_split():
    stepper = jt.make_step(
        lambda p, b: jnp.mean(b["x"] @ p) * b["c"],
        optax.sgd(1.0),
        parallel=Sharded(make_mesh("fsdp=8")),
    )
    batch = {"x": np.ones((16, 8), np.float32), "c": 2.0}
    _, info = stepper.step(stepper.init(jnp.ones((8, 8))), batch)
    assert float(info.loss) == 16
    with pytest.raises(
        ValueError, match="'x' has 12 examples, and the mesh fsdp=8 splits it over 8"
    ):
        stepper.step(stepper.init(jnp.ones((8, 8))), {**batch, "x": batch["x"][:12]})
