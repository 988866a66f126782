"""Steps over a mesh; test_several_devices.py runs this file in a process with four CPU devices."""

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


def oracle(params, batch, mask=None, centred=False):
    """The gradient of the mean over some rows, in float64, by hand."""
    x, y, w1, w2 = (np.float64(a) for a in (batch["x"], batch["y"], params["w1"], params["w2"]))
    weight = np.ones(B) if mask is None else np.float64(mask)
    hidden = np.tanh(x @ w1)
    seen = hidden - hidden.mean(0) if centred else hidden
    residual = (seen @ w2)[:, 0] - y
    out = (2 * weight * residual / weight.sum())[:, None]
    back = out @ w2.T
    if centred:
        back = back - back.mean(0)
    grads = {"w1": x.T @ (back * (1 - hidden**2)), "w2": seen.T @ out}
    return grads, (weight * residual**2).sum() / weight.sum()


def step_once(loss_fn, *, key=None, batch=None, **options):
    """A step of plain gradient descent at rate 1, so that the parameters' change is the gradient."""
    params, made = make()
    stepper = jt.make_step(loss_fn, optax.sgd(1.0), **options)
    state, info = stepper.step(stepper.init(params, key=key), made if batch is None else batch)
    grads = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), params, state.params)
    return grads, state, info


def assert_close(a, b, tolerance=2.0**-18):
    """Sums of B, D and H terms in float32, each rounded by 2^-24, against the largest of a leaf."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize("loss_fn", [mean_loss, weighted_loss])
def test_four_devices_are_one_large_batch(loss_fn):
    params, batch = make()
    grads, loss = oracle(params, batch, batch["mask"] if loss_fn is weighted_loss else None)
    got, state, info = step_once(loss_fn, parallel=jt.DataParallel(MESH), micro_batches=2)
    assert_close(got, grads)
    assert_close(info.loss, loss)
    assert state.params["w1"].sharding.is_fully_replicated


def test_each_part_on_each_device_has_its_own_key():
    def noisy(params, batch, *, key):
        kept = jax.random.bernoulli(key, 0.5, batch["y"].shape)
        loss = jnp.mean(squares(params, batch) * kept)
        return loss, {"key": jax.random.key_data(key), "loss": loss, "count": kept.sum()}

    got, _, info = step_once(
        noisy, micro_batches=2, parallel=jt.DataParallel(MESH), key=jax.random.key(1)
    )
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), n) for n in range(8)]
    np.testing.assert_array_equal(info.aux["key"], [jax.random.key_data(key) for key in keys])
    kept = np.zeros(B, bool)
    for n, key in enumerate(keys):  # device n // 2 has 8 rows and takes every second one
        first = 8 * (n // 2) + n % 2
        kept[first : first + 8 : 2] = jax.random.bernoulli(key, 0.5, (4,))
    grads, loss = oracle(*make(), kept)
    assert_close(got, jax.tree.map(lambda g: g * kept.sum() / B, grads))
    assert_close(info.aux["loss"], loss * kept.sum() / B)
    assert info.aux["count"].sum() == kept.sum()


def test_metrics_are_averaged_by_each_devices_own_weight():
    def loss_fn(params, batch):
        loss = weighted_loss(params, batch)
        return loss, {"loss": loss.total / loss.weight}

    _, batch = make()
    parts = batch["mask"].reshape(4, 4, 2).sum(1).ravel()
    assert len({*parts.tolist()}) > 1  # else any weights would do
    _, _, info = step_once(loss_fn, parallel=jt.DataParallel(MESH), micro_batches=2)
    assert_close(info.aux["loss"], info.loss)


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
    stepper = jt.make_step(
        mean_loss, optax.sgd(1.0), policy, parallel=jt.DataParallel(MESH, reduce_dtype=reduce_dtype)
    )
    params, batch = make()
    lowered = stepper.step.lower(stepper.init(params), batch)
    sent = all_reduces(lowered.as_text())
    assert sorted(sent) == sorted([(1, "f32"), (D * H, asked), (H, asked)])
    width = {"f32": 4, "bf16": 2, "f16": 2}
    assert sum(n * width[d] for n, d in sent) == size * PARAMETERS + 4
    assert compiled_all_reduces(lowered.compile().as_text()) == {on_cpu}


def test_without_it_jit_reduces_in_the_compute_dtype():
    # Only here: under automatic sharding, the sum is part of the backward pass.
    params, batch = make()
    grad_fn = jt.value_and_grad(mean_loss, "mixed_float16")
    whole, shared = NamedSharding(AUTO, P()), NamedSharding(AUTO, P("data"))
    run = jax.jit(
        lambda p, b: grad_fn(p, b).grads, in_shardings=(whole, shared), out_shardings=whole
    )
    assert compiled_all_reduces(run.lower(params, batch).compile().as_text()) == {"f16"}


def test_a_narrow_reduction_is_wrong_by_its_roundings_and_no_more():
    got, _, _ = step_once(mean_loss, parallel=jt.DataParallel(MESH, reduce_dtype="bfloat16"))
    params, batch = make()
    exact, _ = oracle(params, batch)
    shares = [oracle(params, batch, np.arange(B) // 8 == d)[0] for d in range(4)]
    for key in params:
        # Each summand is rounded, and each of the three sums at most: by half a unit, 2^-9.
        size = sum(np.abs(share[key]) for share in shares) / 4
        error = np.abs(got[key] - exact[key])
        assert (error <= 4 * 2.0**-9 * size + 2.0**-18 * size.max()).all()
        assert error.max() > 2.0**-14 * size.max()  # it was narrow


# One stepper for two tests: to compile it takes longer than to run them.
FP16 = jt.make_step(
    mean_loss, optax.adam(0.1), "mixed_float16", loss_scale=jt.DynamicLossScale(2.0**8),
    parallel=jt.DataParallel(MESH), micro_batches=2,
)  # fmt: skip


def test_an_overflow_on_one_device_skips_the_step_on_all():
    params, batch = make()
    state, info = FP16.step(FP16.init(params), batch)
    assert info.finite
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    batch["x"][21, 3] = 6e4  # on the third device
    batch["y"][21] = -6e4
    state, info = FP16.step(state, batch)
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
    def large(params, batch):
        return 1e6 * mean_loss(params, batch)

    grads, _ = oracle(*make())
    assert 1e6 * np.abs(grads["w2"]).max() < 1e7  # far within float32 and bfloat16
    _, _, info = step_once(
        large, parallel=jt.DataParallel(MESH, reduce_dtype="float16"), skip_nonfinite=True
    )
    assert not info.finite


def test_a_loss_that_reduces_over_the_devices_itself_is_differentiated_rightly():
    # As a synchronised BatchNorm does: the mean over the whole batch is taken from each row.
    def loss_fn(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["w1"])
        hidden = hidden - jax.lax.pmean(hidden.mean(0), "data")
        error = ((hidden @ params["w2"])[:, 0] - batch["y"]) ** 2
        return jt.WeightedLoss((error * batch["mask"]).sum(), batch["mask"].sum())

    params, batch = make()
    grads, loss = oracle(params, batch, batch["mask"], centred=True)
    got, _, info = step_once(loss_fn, parallel=jt.DataParallel(MESH))
    assert_close(got, grads)
    assert_close(info.loss, loss)


def test_model_state_is_the_mean_over_the_devices():
    def loss_fn(params, batch, *, model_state):
        new = {"mean": batch["y"].mean(), "seen": model_state["seen"] + 1}
        return mean_loss(params, batch), None, new

    params, batch = make()
    stepper = jt.make_step(loss_fn, optax.sgd(1.0), parallel=jt.DataParallel(MESH))
    state = stepper.init(params, model_state={"mean": jnp.float32(0), "seen": 0})
    state, _ = stepper.step(state, batch)
    np.testing.assert_allclose(state.model_state["mean"], batch["y"].mean(), rtol=2.0**-20)
    assert state.model_state["seen"] == 1


def test_the_batch_may_be_placed_already():
    params, batch = make()
    placed = jax.device_put(batch, NamedSharding(MESH, P("data")))
    got, _, _ = step_once(mean_loss, parallel=jt.DataParallel(MESH), batch=placed)
    assert_close(got, oracle(params, batch)[0])


def test_a_mesh_of_two_axes_shares_out_over_one_and_nothing_is_traced_again():
    counted = chex.assert_max_traces(n=1)(mean_loss)
    chex.clear_trace_counter()
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    stepper = jt.make_step(
        counted, optax.sgd(0.0), parallel=jt.DataParallel(mesh, reduce_dtype="bfloat16")
    )
    params, batch = make()
    state = stepper.init(params)
    for _ in range(3):
        state, info = stepper.step(state, batch)
    assert_close(info.loss, oracle(params, batch)[1])


def test_scan_over_devices_is_bitwise_the_single_steps():
    params, batch = make()
    one, many = FP16.init(params), FP16.init(params)
    for _ in range(2):
        one, info = FP16.step(one, batch)
    assert info.finite
    many, _ = FP16.scan(many, jax.tree.map(lambda x: np.stack([x] * 2), batch))
    chex.assert_trees_all_equal(jax.device_get(one), jax.device_get(many))


def test_what_does_not_fit_is_refused():
    params, batch = make()
    stepper = jt.make_step(
        mean_loss, optax.sgd(1.0), parallel=jt.DataParallel(MESH), micro_batches=3
    )
    with pytest.raises(ValueError, match=r"has 32 examples; .* 12, .* 4 devices x 3 micro-batches"):
        stepper.step(stepper.init(params), batch)
    with pytest.raises(ValueError, match="no axis 'dat'; did you mean 'data'"):
        jt.make_step(mean_loss, optax.sgd(1.0), parallel=jt.DataParallel(MESH, axis_name="dat"))
