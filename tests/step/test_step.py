"""The train step: equal to a hand-written one, and untouched by a non-finite step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmp_train as jt
from jmp_train import testing
from jmp_train.testing import assert_costs_nothing, assert_one_compilation

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16", "bf16", "f16")


def loss_fn(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params["w1"] + params["b1"])
    logits = (hidden @ params["w2"]).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return loss, {"logits_max": logits.max()}


def make_params(seed=0, width=64, scale=0.1):
    k1, k2 = jax.random.split(jax.random.key(seed))
    return {
        "w1": scale * jax.random.normal(k1, (32, width)),
        "b1": jnp.zeros(width),
        "w2": scale * jax.random.normal(k2, (width, 10)),
    }


def make_batch(seed=0, size=256):
    k1, k2 = jax.random.split(jax.random.key(100 + seed))
    return {"x": jax.random.normal(k1, (size, 32)), "y": jax.random.randint(k2, (size,), 0, 10)}


def optimizer():
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, 100)),
    )


def host_copy(tree):
    """A copy that donation cannot take away."""
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def hand_written(opt, donate=()):
    def step(params, opt_state, batch):
        (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        updates, opt_state = opt.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, aux

    return jax.jit(step, donate_argnums=donate)


def test_the_float32_step_computes_what_the_hand_written_one_does():
    opt, params = optimizer(), make_params()
    theirs, opt_state, by_hand = params, opt.init(params), hand_written(opt)
    stepper = jt.make_step(loss_fn, opt, "float32")
    state = stepper.init(params)
    for n in range(10):
        state, info = stepper.step(state, make_batch(n))
        theirs, opt_state, loss, _ = by_hand(theirs, opt_state, make_batch(n))
        assert float(info.loss) == float(loss)
    chex.assert_trees_all_equal(state.params, theirs)
    chex.assert_trees_all_equal(state.opt_state, opt_state)


def test_the_float32_step_costs_what_the_hand_written_one_does():
    # Within 1 % in FLOPs, bytes and memory; ours counts its steps as well.
    opt, params, batch = optimizer(), make_params(width=256), make_batch()
    stepper = jt.make_step(loss_fn, opt, "float32")
    state = stepper.init(params)
    ours = stepper.step.lower(state, batch).compile()
    theirs = hand_written(opt, donate=(0, 1)).lower(params, opt.init(params), batch).compile()
    assert_costs_nothing(ours, theirs, rtol=0.01)
    assert_costs_nothing(theirs, ours, rtol=0.01)
    # To skip, and to remember what was not finite, adds the check's pass over the gradients alone; a
    # select between old and new state would add 18 % of bytes.
    skipping = jt.make_step(loss_fn, opt, "float32", skip_nonfinite=True)
    state = skipping.init(params)
    skips = skipping.step.lower(state, batch).compile().cost_analysis()
    for key in ("flops", "bytes accessed"):
        assert skips[key] < 1.03 * theirs.cost_analysis()[key], key


def test_the_state_is_donated_and_the_callers_parameters_are_not():
    params = make_params()
    stepper = jt.make_step(loss_fn, optimizer(), "mixed_float16")
    state = stepper.init(params)
    stepper.step(state, make_batch())
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


@testing.policies(*POLICIES)
def test_parameters_keep_the_policys_dtype_and_optimizer_state_is_float32(policy):
    stepper = jt.make_step(loss_fn, optimizer(), policy)
    state = stepper.init(make_params())
    for n in range(3):
        state, info = stepper.step(state, make_batch(n))
    expected = jt.get_policy(policy).param_dtype
    assert all(x.dtype == expected for x in jax.tree.leaves(state.params))
    floating = [
        x for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert floating and all(x.dtype == jnp.float32 for x in floating)
    assert info.loss.dtype == jnp.float32
    scaled = expected == jnp.float16 or policy == "mixed_float16"
    assert info.loss_scale.dtype == jnp.float32 if scaled else info.loss_scale is None
    assert (info.finite is not None) == scaled


@pytest.mark.parametrize("policy,tolerance", [("mixed_bfloat16", 2**-8), ("mixed_float16", 2**-11)])
def test_mixed_precision_follows_the_float32_run(policy, tolerance):
    # The loss is of order 1 and its error after some steps a small multiple of the format's half
    # unit in the last place; 16 such units would already be a visible fault.
    losses = {}
    for name in ("float32", policy):
        stepper = jt.make_step(loss_fn, optax.sgd(0.1), name)
        state = stepper.init(make_params())
        losses[name] = []
        for n in range(20):
            state, info = stepper.step(state, make_batch(n))
            losses[name].append(float(info.loss))
    np.testing.assert_allclose(losses[policy], losses["float32"], atol=16 * tolerance)


def overflowing_batch():
    batch = make_batch(7)
    return {**batch, "x": batch["x"].at[3, 5].set(60000.0)}  # finite in float16, its product is not


@testing.policies("mixed_float16", "f16")
def test_a_step_with_overflowing_gradients_changes_nothing_and_halves_the_scale(policy):
    stepper = jt.make_step(loss_fn, optimizer(), policy, grad_norm=True)
    state = stepper.init(make_params(scale=3.0))
    state, info = stepper.step(state, make_batch(0))
    while not info.finite:  # the first scale may be too large for these parameters
        state, info = stepper.step(state, make_batch(0))
    before = host_copy(state)
    state, info = stepper.step(state, overflowing_batch())
    assert not info.finite
    chex.assert_trees_all_equal(host_copy(state.params), before.params)
    chex.assert_trees_all_equal(host_copy(state.opt_state), before.opt_state)
    assert float(state.loss_scale.loss_scale) == float(before.loss_scale.loss_scale) / 2
    assert int(state.step) == int(before.step) + 1
    assert int(state.skipped) == int(before.skipped) + 1
    assert int(state.skipped_in_row) == 1
    state, info = stepper.step(state, make_batch(1))
    assert info.finite and int(state.skipped_in_row) == 0
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), host_copy(state.params), before.params)
    assert moved["w1"] and moved["w2"]


def test_the_schedules_count_waits_over_a_skipped_step():
    stepper = jt.make_step(loss_fn, optimizer(), "mixed_float16")
    state = stepper.init(make_params())
    counts = []
    for batch in (make_batch(0), overflowing_batch(), overflowing_batch(), make_batch(1)):
        state, _ = stepper.step(state, batch)
        counts.append([int(x) for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32])
    assert counts[1] == counts[2] == counts[0]
    assert all(b == a + 1 for a, b in zip(counts[2], counts[3], strict=True))


def test_the_last_skip_tells_its_step_and_the_gradients_that_were_not_finite():
    def two_parts(params, batch):
        return jnp.sum(params["a"] * batch["a"]) + jnp.sum(params["b"] * batch["b"])

    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    stepper = jt.make_step(two_parts, optax.sgd(0.1), "mixed_float16")
    good = {"a": jnp.full(2, 2.0**-8), "b": jnp.full(2, 2.0**-8)}
    state = stepper.init(params)
    assert state.last_skip is not None
    assert int(state.last_skip.step) == 0 and not state.last_skip.nonfinite.any()
    for batch in (good, {**good, "b": jnp.array([1.0, jnp.inf])}, good):
        state, _ = stepper.step(state, batch)
    assert int(state.last_skip.step) == 2 and state.last_skip.nonfinite.tolist() == [False, True]
    state, _ = stepper.step(state, {**good, "a": good["a"] * jnp.nan})
    assert int(state.last_skip.step) == 4 and state.last_skip.nonfinite.tolist() == [True, False]
    assert jt.make_step(two_parts, optax.sgd(0.1)).init(params).last_skip is None


def test_a_non_finite_batch_is_skipped_under_any_policy_that_is_told_to():
    stepper = jt.make_step(loss_fn, optimizer(), "mixed_bfloat16", skip_nonfinite=True)
    state = stepper.init(make_params())
    before = host_copy(state.params)
    batch = make_batch()
    state, info = stepper.step(state, {**batch, "x": batch["x"] * jnp.nan})
    assert not info.finite and int(state.skipped) == 1
    chex.assert_trees_all_equal(host_copy(state.params), before)


def test_model_state_is_float32_kept_over_skips_and_follows_the_model():
    def with_mean(params, batch, *, model_state):
        mean = 0.9 * model_state["mean"] + 0.1 * batch["x"].mean(0)
        loss, aux = loss_fn(params, batch)
        return loss, aux, {"mean": mean.astype(batch["x"].dtype)}

    stepper = jt.make_step(with_mean, optimizer(), "mixed_float16")
    state = stepper.init(make_params(), model_state={"mean": jnp.zeros(32, jnp.float16)})
    assert state.model_state["mean"].dtype == jnp.float32
    state, info = stepper.step(state, make_batch())
    assert info.finite
    mean = host_copy(state.model_state["mean"])
    assert mean.dtype == np.float32 and np.abs(mean).max() > 0
    state, info = stepper.step(state, overflowing_batch())
    assert not info.finite
    np.testing.assert_array_equal(state.model_state["mean"], mean)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_plain_numbers_in_the_model_state_are_arrays_to_the_step(micro_batches):
    def counting(params, batch, *, model_state):
        seen = {"rate": 0.5, "steps": model_state["steps"] + 1, "key": model_state["key"]}
        return (params * batch).sum(), None, seen

    stepper = jt.make_step(counting, optax.sgd(0.1), micro_batches=micro_batches)
    first = {"rate": 1.0, "steps": 0, "key": jax.random.key(0)}
    state = stepper.init(jnp.ones(2), model_state=first)
    with assert_one_compilation(stepper.step) as step:
        for _ in range(2):
            state, _ = step(state, jnp.ones((2, 2)))
    assert (state.model_state["rate"], state.model_state["steps"]) == (0.5, 2 * micro_batches)
    assert state.model_state["rate"].dtype == jnp.float32


@pytest.mark.parametrize(
    "returned,message",
    [
        ({"a": {"mean": jnp.ones(3)}, "n": 1}, r"'a/mean' with shape \(3,\).*expected shape \(\)"),
        ({"a": {"mean": 1.0}}, "no 'n'; expected .* with 'a/mean', 'n'"),
        ({"a": {"mean": 1.0}, "n": 1, "b": 2}, "an extra 'b'; expected"),
        (None, "no 'a/mean', no 'n'; expected"),
        ({"a": {"mean": 1.0}, "n": [1]}, "no 'n', an extra 'n/0'; expected"),
    ],
)
@pytest.mark.parametrize("micro_batches,skip", [(1, None), (1, True), (2, None)])
def test_a_model_state_of_another_shape_or_structure_is_named(
    returned, message, micro_batches, skip
):
    def changing(params, batch, *, model_state):
        return (params * batch).sum(), None, returned

    stepper = jt.make_step(
        changing, optax.sgd(0.1), micro_batches=micro_batches, skip_nonfinite=skip
    )
    state = stepper.init(jnp.ones(2), model_state={"a": {"mean": 0.0}, "n": 0})
    with pytest.raises(TypeError, match=message):
        stepper.step.lower(state, jnp.ones((2, 2)))


def test_each_step_gets_a_fresh_key_that_depends_on_its_number_alone():
    def noisy(params, batch, *, key):
        return jnp.sum(params * 0) + jax.random.uniform(key), None

    stepper = jt.make_step(noisy, optax.sgd(0.1))
    runs = []
    for _ in range(2):
        state = stepper.init(jnp.ones(2), key=jax.random.key(3))
        losses = []
        for _ in range(4):
            state, info = stepper.step(state, None)
            losses.append(float(info.loss))
        runs.append(losses)
    assert runs[0] == runs[1] and len(set(runs[0])) == 4


@testing.policies("float32", "mixed_float16")
def test_scan_is_bitwise_the_same_as_single_steps(policy):
    stepper = jt.make_step(loss_fn, optimizer(), policy)
    one, many = stepper.init(make_params()), stepper.init(make_params())
    batches = [make_batch(n) for n in range(6)]
    losses = []
    for batch in batches:
        one, info = stepper.step(one, batch)
        losses.append(float(info.loss))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    many, infos = stepper.scan(many, stacked)
    assert infos.loss.shape == (6,)
    np.testing.assert_array_equal(infos.loss, losses)
    chex.assert_trees_all_equal(host_copy(one), host_copy(many))


def test_nothing_is_traced_again_when_a_number_changes():
    @chex.assert_max_traces(n=1)
    def counted(params, batch):
        return loss_fn(params, batch)

    stepper = jt.make_step(counted, optimizer(), "mixed_float16")
    state = stepper.init(make_params())
    with assert_one_compilation(stepper.step) as step:
        for batch in (make_batch(0), overflowing_batch(), make_batch(1), make_batch(2)):
            state, _ = step(state, batch)


def test_grad_norm_is_the_unscaled_norm_before_clipping():
    params, batch = make_params(), make_batch()
    stepper = jt.make_step(loss_fn, optimizer(), "mixed_float16", grad_norm=True)
    _, info = stepper.step(stepper.init(params), batch)
    grads = jax.grad(lambda p: loss_fn(p, batch)[0])(params)
    expected = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert float(info.grad_norm) == pytest.approx(expected, rel=2**-9)
    _, info = jt.make_step(loss_fn, optimizer()).step(
        jt.make_step(loss_fn, optimizer()).init(params), batch
    )
    assert info.grad_norm is None


@pytest.mark.parametrize(
    "returned,message",
    [
        (lambda p: (p.sum(), 1, 2, 3), "returned 4 values; expected loss or"),
        (lambda p: (p.sum(), 1, 2), "returned 3 values; expected loss or"),
        (lambda p: p, "expected a real scalar"),
    ],
)
def test_a_wrong_return_value_of_the_loss_function_is_named(returned, message):
    stepper = jt.make_step(lambda params, batch: returned(params), optax.sgd(0.1))
    with pytest.raises(TypeError, match=message):
        stepper.step(stepper.init(jnp.ones(3)), None)


def test_scan_donates_its_state_and_compiles_once():
    stepper = jt.make_step(loss_fn, optimizer(), "mixed_float16")
    state = stepper.init(make_params())
    batches = jax.tree.map(lambda *x: jnp.stack(x), make_batch(0), make_batch(1))
    with assert_one_compilation(stepper.scan) as scan:
        second, _ = scan(state, batches)
        assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
        scan(second, batches)


@testing.policies("float32", "mixed_float16", "bf16")
@pytest.mark.parametrize("weak", [2.0, jnp.asarray(2.0), jnp.full((3,), 2.0)], ids=str)
def test_weakly_typed_parameters_compile_once(policy, weak):
    stepper = jt.make_step(
        lambda params, batch: jnp.sum(params["w"] * batch), optax.adam(0.1), policy
    )
    state = stepper.init({"w": weak})
    with assert_one_compilation(stepper.step) as step:
        for _ in range(3):
            state, _ = step(state, jnp.ones(3))


def test_the_batch_can_be_kept_in_its_dtype():
    seen = []

    def spying(params, batch):
        seen.append((params.dtype, batch.dtype))
        return jnp.sum(params.astype(jnp.float32) * batch)

    for cast_batch in (True, False):
        stepper = jt.make_step(spying, optax.sgd(0.1), "mixed_bfloat16", cast_batch=cast_batch)
        stepper.step(stepper.init(jnp.ones(3)), jnp.ones(3))
    assert seen == [(jnp.bfloat16, jnp.bfloat16), (jnp.bfloat16, jnp.float32)]


def test_without_a_policy_nothing_is_cast():
    seen = []

    def spying(params, batch):
        seen.append((params["a"].dtype, params["b"].dtype, batch.dtype))
        return jnp.sum(params["a"].astype(jnp.float32) + params["b"] * batch)

    stepper = jt.make_step(spying, optax.adam(0.1), None)
    state = stepper.init({"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3)})
    state, info = stepper.step(state, jnp.ones(3))
    assert seen == [(jnp.bfloat16, jnp.float32, jnp.float32)]
    assert state.params["a"].dtype == jnp.bfloat16 and info.loss_scale is None
    assert state.opt_state[0].mu["a"].dtype == jnp.float32


def test_the_moving_average_is_that_of_float64_and_a_skipped_step_leaves_it():
    stepper = jt.make_step(
        lambda params, batch: jnp.sum(params["w"].astype(jnp.float32) * batch),
        optax.sgd(0.125),
        "f16",  # parameters in float16, their average in float32
        loss_scale=jt.StaticLossScale(1.0),
        ema_decay=0.5,
    )
    state = stepper.init({"w": jnp.ones(3)})
    assert state.ema["w"].dtype == jnp.float32 and state.params["w"].dtype == jnp.float16
    average, taken = np.ones(3), 0
    for n in range(20):
        bad = n % 4 == 2
        state, info = stepper.step(state, jnp.full(3, jnp.inf if bad else (-1.0) ** n * n))
        assert bool(info.finite) != bad
        if not bad:
            decay = min(0.5, (1 + taken) / (10 + taken))
            average = decay * average + (1 - decay) * np.asarray(state.params["w"], np.float64)
            taken += 1
        # Each update rounds three times; the average forgets half of the error at each.
        np.testing.assert_allclose(state.ema["w"], average, rtol=6 * 2**-24, atol=6 * 2**-24 * 2)
    assert state.eval_params is state.ema and stepper.step._cache_size() == 1


def test_an_impossible_decay_is_refused():
    with pytest.raises(ValueError, match="ema_decay is 1; expected 0 < ema_decay < 1"):
        jt.make_step(lambda params, batch: 0.0, optax.sgd(1.0), ema_decay=1)
