"""Loss scales survive JSON bit for bit, and continue from the state of a GradScaler."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_gradscaler_trajectories import PATH

import jmp_train as jt
from jmp_train.testing import assert_same_bits

TOP = 2**31 - 1
normal = st.floats(2.0**-126, 2.0**127, width=32)
dynamic = st.builds(
    jt.DynamicLossScale,
    normal,
    st.integers(0, TOP),
    period=st.integers(1, TOP),
    factor=st.floats(1, 1e9),
    min_loss_scale=st.just(0) | st.floats(2.0**-126, 1.0),
    backoff_factor=st.none() | st.floats(2.0**-20, 1.0),
    max_loss_scale=st.none() | st.floats(1.0, 1e30),
    hysteresis=st.integers(5, TOP),
    hysteresis_left=st.none() | st.integers(0, 5),
    consecutive_hysteresis=st.booleans(),
)
any_kind = dynamic | st.builds(jt.StaticLossScale, normal) | st.just(jt.NoOpLossScale())


@settings(max_examples=100, deadline=None)
@given(state=any_kind)
def test_every_loss_scale_comes_back_from_strict_json_to_the_bit(state):
    text = json.dumps(jt.loss_scales.loss_scale_to_dict(state), allow_nan=False)
    after = jt.loss_scales.loss_scale_from_dict(json.loads(text))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    if jax.tree.leaves(state):  # a static one has none
        assert_same_bits(after, state)


def test_the_dict_holds_every_field_in_plain_numbers():
    state = jt.DynamicLossScale(jnp.float32(48), jnp.int32(1), hysteresis=2).adjust(True)
    entries = jt.loss_scales.loss_scale_to_dict(state)
    names = [field.name for field in dataclasses.fields(state)]
    assert list(entries) == ["kind", *names]
    assert {type(value) for value in entries.values()} <= {str, int, float, bool, type(None)}
    assert (entries["loss_scale"], entries["counter"], entries["hysteresis_left"]) == (48.0, 2, 2)
    with pytest.raises(
        TypeError, match="3 is not a loss scale; expected one of NoOpLossScale, Sta"
    ):
        jt.loss_scales.loss_scale_to_dict(3)  # pyright: ignore[reportArgumentType]


GOOD = jt.loss_scales.loss_scale_to_dict(jt.DynamicLossScale(8.0, hysteresis=2))


@pytest.mark.parametrize(
    "entries,message",
    [
        ({}, "the kind of the loss scale is None; expected 'none', 'static' or 'dynamic'"),
        (None, "the kind of the loss scale is None"),
        ([1], "the kind of the loss scale is None"),
        ({"kind": ["none"]}, r"the kind of the loss scale is \['none'\]"),
        ({"kind": "dynamik"}, "the kind of the loss scale is 'dynamik'"),
        ({"kind": "none", "scale": 1}, "unknown key 'scale' in a loss scale of kind 'none'"),
        ({"kind": "static"}, "a loss scale of kind 'static' has no 'loss_scale'"),
        ({"kind": "static", "loss_scale": 0}, "loss_scale is 0.0; expected 0 < it < inf"),
        ({"kind": "static", "loss_scale": -1.0}, "loss_scale is -1.0; expected 0 < it < inf"),
        ({"kind": "static", "loss_scale": 1e-40}, "loss_scale is .*e-4.; expected .* 1.18e-38"),
        ({"kind": "static", "loss_scale": 1e39}, "loss_scale is inf; expected 0 < it < inf"),
        (
            {"kind": "static", "loss_scale": float("nan")},
            "loss_scale is nan; expected 0 < it < inf",
        ),
        (
            {"kind": "static", "loss_scale": float("inf")},
            "loss_scale is inf; expected 0 < it < inf",
        ),
        ({"kind": "static", "loss_scale": None}, "loss_scale is None; expected a number"),
        (GOOD | {"perod": 1}, "unknown key 'perod' .*; did you mean 'period'"),
        ({k: v for k, v in GOOD.items() if k != "counter"}, "has no 'counter'; expected loss_sc"),
        (GOOD | {"loss_scale": "8"}, "loss_scale is '8'; expected a number"),
        (GOOD | {"loss_scale": True}, "loss_scale is True; expected a number"),
        (GOOD | {"loss_scale": float("nan")}, "loss_scale is nan; expected 0 < it < inf"),
        (GOOD | {"loss_scale": 1e39}, "loss_scale is inf; expected 0 < it < inf"),
        (GOOD | {"loss_scale": 10**400}, "too large"),
        (GOOD | {"factor": 10**400}, "factor is .*; expected a number"),
        (GOOD | {"counter": 1.0}, "counter is 1.0; expected a whole number"),
        (GOOD | {"counter": -1}, "counter is -1; expected 0 to 2147483647"),
        (GOOD | {"period": False}, "period is False; expected a whole number"),
        (GOOD | {"period": 0}, "period is 0; expected 1 to 2147483647 steps"),
        (GOOD | {"backoff_factor": "x"}, "backoff_factor is 'x'; expected a number or None"),
        (GOOD | {"hysteresis_left": 3}, "hysteresis_left is 3; expected 0 to 2"),
        (GOOD | {"consecutive_hysteresis": 1}, "consecutive_hysteresis is 1; expected True or Fal"),
    ],
)
def test_invalid_loss_scale_dict_is_refused_by_name(entries, message):
    with pytest.raises(ValueError, match=message):
        jt.loss_scales.loss_scale_from_dict(entries)


# From GradScaler.

GRADSCALER = {
    "scale": 512.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 5,
    "_growth_tracker": 3,
}


@jax.jit
def go_on(state, finite):
    def step(state, finite):
        state = state.adjust(finite)
        return state, (state.loss_scale, state.counter)

    return jax.lax.scan(step, state, finite)[1]


@pytest.mark.parametrize("factor,backoff,interval", [(2.0, 0.5, 4), (1.5, 0.75, 1)])
def test_converted_gradscaler_state_continues_as_the_gradscaler_does(factor, backoff, interval):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)

    def run(scaler, finite):
        parameter = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.SGD([parameter])
        scaler.scale(torch.zeros(()))
        for ok in finite:
            parameter.grad = torch.zeros(()) if ok else torch.full((), torch.inf)
            scaler.step(optimizer)
            scaler.update()
            yield scaler.get_scale(), scaler._get_growth_tracker()

    for before in (0, 1, 17):
        scaler = torch.amp.GradScaler("cpu", 2.0**10, factor, backoff, interval)
        list(run(scaler, rng.random(before) < 0.8))
        # GradScaler's own way of going on: its state through JSON into a new one.
        state_dict = json.loads(json.dumps(scaler.state_dict()))
        loaded = torch.amp.GradScaler("cpu")
        loaded.load_state_dict(state_dict)
        finite = rng.random(60) < 0.8
        want_scale, want_tracker = zip(*run(loaded, finite), strict=True)
        scale, counter = go_on(jt.loss_scales.loss_scale_from_gradscaler(state_dict), finite)
        assert np.asarray(scale).tolist() == list(want_scale)
        assert np.asarray(counter).tolist() == list(want_tracker)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    assert jt.loss_scales.loss_scale_from_gradscaler(disabled.state_dict()) == jt.NoOpLossScale()


def test_a_recorded_gradscaler_is_taken_over_in_mid_run():
    case = json.loads(PATH.read_text())["cases"][3]
    steps = itertools.cycle((case["first_run_is_finite"], not case["first_run_is_finite"]))
    finite = np.array([ok for ok, n in zip(steps, case["runs"], strict=False) for _ in range(n)])
    scales = np.full(len(finite) + 1, case["init_scale"])
    for step, scale in case["changes"]:
        scales[step + 1 :] = scale
    moved = {step for step, _ in case["changes"]}
    cut = 50
    good = 0
    for step in range(cut):  # good steps since the scale moved or a step was skipped
        good = good + 1 if finite[step] and step not in moved else 0
    names = ("growth_factor", "backoff_factor", "growth_interval")
    state_dict = {name: case[name] for name in names}
    state_dict |= {"scale": scales[cut].item(), "_growth_tracker": good}
    scale, counter = go_on(jt.loss_scales.loss_scale_from_gradscaler(state_dict), finite[cut:])
    assert len(set(scales[cut:])) > 3 and good > 0
    np.testing.assert_array_equal(scale, scales[cut + 1 :])
    assert counter[-1] == case["last_growth_tracker"]


def test_a_disabled_gradscaler_means_no_loss_scaling():
    assert jt.loss_scales.loss_scale_from_gradscaler({}) == jt.NoOpLossScale()


@pytest.mark.parametrize(
    "entries,message",
    [
        (None, "a GradScaler's state is None; expected a dict"),
        (GOOD, "unknown key 'kind' in a GradScaler's state"),
        ({"scale": 1.0}, "a GradScaler's state has no 'growth_factor'"),
        (GRADSCALER | {"_growth_tracer": 1}, "did you mean '_growth_tracker'"),
        (GRADSCALER | {"growth_interval": 0}, "growth_interval is 0; expected 1 to 2147483647"),
        (GRADSCALER | {"growth_interval": 2.0}, "growth_interval is 2.0; expected a whole number"),
        (GRADSCALER | {"growth_factor": 0.5}, "^growth_factor is 0.5; expected at least 1"),
        (GRADSCALER | {"backoff_factor": 0}, "^backoff_factor is 0.0; expected 0 < it <= 1"),
        (GRADSCALER | {"scale": 1e-40}, "^scale is .*e-4.; expected .* 1.18e-38"),
        (GRADSCALER | {"scale": 0.0}, "^scale is 0.0; expected 0 < it < inf"),
        (GRADSCALER | {"_growth_tracker": -1}, "^_growth_tracker is -1; expected 0 to 21"),
        (GRADSCALER | {"_growth_tracker": 5}, "_growth_tracker is 5; .* below growth_interval, 5"),
    ],
)
def test_invalid_gradscaler_dict_is_refused_by_gradscaler_names(entries, message):
    with pytest.raises(ValueError, match=message):
        jt.loss_scales.loss_scale_from_gradscaler(entries)


def test_a_gradscalers_state_in_the_wrong_place_is_told_the_right_one():
    with pytest.raises(ValueError, match="use loss_scale_from_gradscaler"):
        jt.loss_scales.loss_scale_from_dict(GRADSCALER)
