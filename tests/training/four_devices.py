"""Steps over a mesh; run by test_mesh.py in a process of its own that has four CPU devices."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jmp_train as jt

B, D, H = 32, 8, 16
PARAMETERS = D * H + H
MESH = jax.make_mesh((4,), ("data",))
AUTO = jax.sharding.Mesh(MESH.devices, MESH.axis_names)


def make(seed=0):
    rng = np.random.default_rng(seed)
    params = {"w1": rng.normal(size=(D, H)) / 3, "w2": rng.normal(size=(H, 1)) / 4}
    batch = {"x": rng.normal(size=(B, D)), "y": rng.normal(size=B)}
    params, batch = jax.tree.map(lambda x: x.astype(np.float32), (params, batch))
    mask = np.arange(B) % 8 < 1 + np.arange(B) // 8  # 1, 2, 3 and 4 rows on the four devices
    return params, {**batch, "mask": mask}


def squares(params, batch):
    out = (jnp.tanh(batch["x"] @ params["w1"]) @ params["w2"]).astype(jnp.float32)
    return (out[:, 0] - batch["y"]) ** 2


def mean_loss(params, batch):
    return squares(params, batch).mean()


def weighted_loss(params, batch):
    return jt.WeightedLoss(
        jnp.where(batch["mask"], squares(params, batch), 0).sum(), batch["mask"].sum()
    )


def step_once(loss_fn, policy="float32", *, key=None, batch=None, **options):
    """A step of plain gradient descent at rate 1, so that the parameters' change is the gradient."""
    params, made = make()
    stepper = jt.make_step(loss_fn, optax.sgd(1.0), policy, **options)
    before = stepper.init(params, key=key)
    state, info = stepper.step(before, made if batch is None else batch)
    grads = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), params, state.params)
    return grads, state, info


def assert_close(a, b, tolerance=2.0**-20):
    """float32 sums of 8 parts, and of B rows, in another order: some roundings of the largest."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize("loss_fn", [mean_loss, weighted_loss])
def test_four_devices_are_one_large_batch(loss_fn):
    want, _, one = step_once(loss_fn)
    got, state, info = step_once(loss_fn, mesh=MESH, micro_batches=2)
    assert_close(got, want)
    assert_close(info.loss, one.loss)
    assert state.params["w1"].sharding.is_fully_replicated


def test_keys_and_metrics_are_those_of_as_many_micro_batches_on_one_device():
    def noisy(params, batch, *, key):
        kept = jax.random.bernoulli(key, 0.5, batch["y"].shape)
        loss = jnp.mean(squares(params, batch) * kept)
        return loss, {"key": jax.random.key_data(key), "loss": loss, "count": kept.sum()}

    want, _, one = step_once(noisy, micro_batches=8, key=jax.random.key(1))
    got, _, info = step_once(noisy, micro_batches=2, mesh=MESH, key=jax.random.key(1))
    assert len({tuple(k) for k in np.asarray(info.aux["key"])}) == 8
    assert_close(got, want)
    np.testing.assert_array_equal(info.aux["key"], one.aux["key"])
    np.testing.assert_array_equal(info.aux["count"], one.aux["count"])
    assert_close(info.aux["loss"], one.aux["loss"])


def all_reduces(text):
    """(elements, dtype) of every all-reduce of a lowered program."""
    types = re.findall(
        r"all_reduce.*?\}\) : \(tensor<([\dx]*?)x?(f\d+|bf16|i\d+)>\)", text, re.DOTALL
    )
    return [(int(np.prod([int(n) for n in s.split("x") if n])), d) for s, d in types]


def compiled_all_reduces(text):
    """Dtypes of the arrays that a compiled program all-reduces, scalars apart."""
    lines = re.findall(r"= (.*?) all-reduce\(", text)
    return {d for line in lines for d in re.findall(r"(\w+)\[\d", line)}


@pytest.mark.parametrize(
    "policy,reduce_dtype,asked,size,on_cpu",
    [
        ("float32", None, "f32", 4, "f32"),
        ("mixed_bfloat16", None, "f32", 4, "f32"),
        ("mixed_float16", "float32", "f32", 4, "f32"),
        ("float32", "bfloat16", "bf16", 2, "f32"),  # XLA promotes it on a CPU
        ("mixed_bfloat16", "float16", "f16", 2, "f16"),
    ],
)
def test_gradients_cross_the_devices_in_the_reduce_dtype(policy, reduce_dtype, asked, size, on_cpu):
    stepper = jt.make_step(mean_loss, optax.sgd(1.0), policy, mesh=MESH, reduce_dtype=reduce_dtype)
    params, batch = make()
    lowered = stepper.step.lower(stepper.init(params), batch)
    sent = all_reduces(lowered.as_text())
    assert sorted(sent) == sorted([(1, "f32"), (D * H, asked), (H, asked)])
    width = {"f32": 4, "bf16": 2, "f16": 2}
    assert sum(n * width[d] for n, d in sent) == size * PARAMETERS + 4
    assert compiled_all_reduces(lowered.compile().as_text()) == {on_cpu}


def test_without_it_jit_reduces_in_the_compute_dtype():
    # What there is to choose: under automatic sharding the sum is part of the backward pass.
    params, batch = make()
    grad_fn = jt.value_and_grad(mean_loss, "mixed_float16")
    whole, shared = NamedSharding(AUTO, P()), NamedSharding(AUTO, P("data"))
    run = jax.jit(
        lambda p, b: grad_fn(p, b).grads, in_shardings=(whole, shared), out_shardings=whole
    )
    assert compiled_all_reduces(run.lower(params, batch).compile().as_text()) == {"f16"}


@pytest.mark.parametrize("reduce_dtype,digits", [("bfloat16", 8), ("float16", 11)])
def test_a_narrow_reduction_is_wrong_by_its_roundings_and_no_more(reduce_dtype, digits):
    exact, _, _ = step_once(mean_loss, mesh=MESH)
    got, _, _ = step_once(mean_loss, mesh=MESH, reduce_dtype=reduce_dtype)
    params, batch = make()
    shares = [jax.tree.map(lambda x, d=d: x[8 * d : 8 * d + 8], batch) for d in range(4)]
    each = [jax.grad(mean_loss)(params, share) for share in shares]
    size = jax.tree.map(lambda *g: sum(np.abs(np.float64(x)) for x in g) / 4, *each)
    for key in params:
        # One rounding of each summand and at most one of each sum, of half a unit; as the change
        # of a parameter near 1, a gradient is rounded by 2^-24 as well.
        error = np.abs(got[key] - exact[key])
        assert (error <= 4 * 2.0**-digits * size[key] + 2.0**-22).all()
        assert error.max() > 2.0**-digits * size[key].max() / 16  # it was narrow


def test_an_overflow_on_one_device_skips_the_step_on_all():
    stepper = jt.make_step(
        mean_loss, optax.adam(0.1), "mixed_float16", loss_scale=jt.DynamicLossScale(2.0**8),
        mesh=MESH, micro_batches=2,
    )  # fmt: skip
    params, batch = make()
    state, info = stepper.step(stepper.init(params), batch)
    assert info.finite
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    batch["x"][21, 3] = 6e4  # on the third device
    batch["y"][21] = -6e4
    state, info = stepper.step(state, batch)
    assert not info.finite
    for shard in state.loss_scale.loss_scale.addressable_shards:
        assert shard.data == 2.0**7
    for old, new in zip(
        jax.tree.leaves(before), jax.tree.leaves((state.params, state.opt_state)), strict=True
    ):
        assert len(new.addressable_shards) == 4
        for shard in new.addressable_shards:
            np.testing.assert_array_equal(shard.data, old)


def test_what_is_beyond_float16_is_found_after_a_float16_reduction():
    options = {"mesh": MESH, "skip_nonfinite": True}
    large = lambda params, batch: 1e6 * mean_loss(params, batch)
    _, _, info = step_once(large, **options, reduce_dtype="float16")
    assert not info.finite
    _, _, info = step_once(large, **options, reduce_dtype="bfloat16")
    assert info.finite


@pytest.mark.parametrize("weighted", [False, True])
def test_a_loss_that_reduces_over_the_devices_itself_is_differentiated_rightly(weighted):
    # As a synchronised BatchNorm does: the mean over the whole batch is taken from each row.
    def loss_fn(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["w1"])
        mean = hidden.mean(0)
        try:
            mean = jax.lax.pmean(mean, "data")
        except NameError:
            pass  # one device
        error = (((hidden - mean) @ params["w2"])[:, 0] - batch["y"]) ** 2
        if not weighted:
            return error.mean()
        return jt.WeightedLoss((error * batch["mask"]).sum(), batch["mask"].sum())

    want, _, _ = step_once(loss_fn)
    got, _, _ = step_once(loss_fn, mesh=MESH)
    assert_close(got, want)


def test_model_state_is_the_mean_over_the_devices():
    def loss_fn(params, batch, *, model_state):
        new = {"mean": batch["y"].mean(), "seen": model_state["seen"] + 1}
        return mean_loss(params, batch), None, new

    params, batch = make()
    stepper = jt.make_step(loss_fn, optax.sgd(1.0), mesh=MESH)
    state = stepper.init(params, model_state={"mean": jnp.float32(0), "seen": 0})
    state, _ = stepper.step(state, batch)
    np.testing.assert_allclose(state.model_state["mean"], batch["y"].mean(), rtol=2.0**-20)
    assert state.model_state["seen"] == 1


@pytest.mark.parametrize("place", [P(), P("data")])
def test_the_batch_may_be_placed_already(place):
    _, batch = make()
    want, _, _ = step_once(mean_loss, mesh=MESH)
    got, _, _ = step_once(
        mean_loss, mesh=MESH, batch=jax.device_put(batch, NamedSharding(MESH, place))
    )
    assert_close(got, want)


def test_a_mesh_of_two_axes_shares_out_over_one_and_nothing_is_traced_again():
    counted = chex.assert_max_traces(n=1)(mean_loss)
    chex.clear_trace_counter()
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    stepper = jt.make_step(counted, optax.sgd(0.0), mesh=mesh, reduce_dtype="bfloat16")
    params, batch = make()
    state = stepper.init(params)
    for _ in range(3):
        state, info = stepper.step(state, batch)
    assert_close(info.loss, np.mean(np.asarray(squares(params, batch), np.float64)))


def test_scan_over_devices_is_bitwise_the_single_steps():
    params, batch = make()
    stepper = jt.make_step(mean_loss, optax.adam(0.1), mesh=MESH, micro_batches=2)
    one, many = stepper.init(params), stepper.init(params)
    for _ in range(2):
        one, _ = stepper.step(one, batch)
    many, _ = stepper.scan(many, jax.tree.map(lambda x: np.stack([x] * 2), batch))
    chex.assert_trees_all_equal(jax.device_get(one), jax.device_get(many))


def test_what_does_not_fit_is_refused():
    params, batch = make()
    stepper = jt.make_step(mean_loss, optax.sgd(1.0), mesh=MESH, micro_batches=3)
    with pytest.raises(ValueError, match=r"has 32 examples; .* 12, .* 4 devices x 3 micro-batches"):
        stepper.step(stepper.init(params), batch)
    with pytest.raises(ValueError, match="no axis 'dat'; did you mean 'data'"):
        jt.make_step(mean_loss, optax.sgd(1.0), mesh=MESH, axis_name="dat")
