"""The loop: when it logs, evaluates and saves, and when it gives up."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmp_train as jt
from jmp_train.runs import loop
from jmp_train.runs.loop import Diverged, Every, run_loop
from jmp_train.step.state import StepInfo


def loss_fn(params, batch):
    return jnp.sum(params * batch), {"size": jnp.sum(batch)}


def run(
    *,
    start=0,
    stop=12,
    per_call=1,
    every=(4, 6, 5),
    policy="float32",
    value=1.0,
    rate=0.1,
    **options,
):
    stepper = jt.make_step(loss_fn, optax.sgd(rate), policy)
    events = []
    batch = jnp.full((2,) if per_call == 1 else (per_call, 2), value)
    result = run_loop(
        stepper.step if per_call == 1 else stepper.scan,
        stepper.init(jnp.ones(2)),
        itertools.repeat(batch),
        start=start,
        stop=stop,
        steps_per_call=per_call,
        every=Every(*every),
        log=lambda step, values, state: events.append(("log", step, values)),
        evaluate=lambda step, state: events.append(("eval", step, state)),
        checkpoint=lambda step, state, _: events.append(("save", step, state)),
        **options,
    )
    return result, events


def steps_of(events, kind):
    return [step for name, step, _ in events if name == kind]


def test_events_come_at_their_intervals_and_at_the_last_step():
    result, events = run()
    assert result.step == 12
    assert steps_of(events, "log") == [4, 8, 12]
    assert steps_of(events, "eval") == [6, 12]
    assert steps_of(events, "save") == [5, 10, 12]


def test_an_event_that_asks_for_it_saves_or_ends():
    stepper, saved = jt.make_step(loss_fn, optax.sgd(0.1)), []
    result = run_loop(
        stepper.step,
        stepper.init(jnp.ones(2)),
        itertools.repeat(jnp.ones(2)),
        start=0,
        stop=12,
        steps_per_call=1,
        every=Every(2, 3, 12),
        log=lambda step, values, state: "stop" if step == 6 else None,
        evaluate=lambda step, state: saved.append(f"eval {step}") or "save",
        checkpoint=lambda step, state, seconds: saved.append(step),
    )
    # The event that ends the run does not keep the others of its step from happening.
    assert saved == ["eval 3", 3, "eval 6", 6] and result.step == 6


def test_a_resumed_loop_keeps_the_same_intervals():
    _, events = run(start=5)
    assert steps_of(events, "log") == [8, 12]
    assert steps_of(events, "save") == [10, 12]


def test_several_steps_a_call_give_the_same_state_and_log_the_last_of_them():
    one, events_one = run(every=(4, 4, 4))
    many, events_many = run(every=(4, 4, 4), per_call=4)
    assert (one.state.params == many.state.params).all()
    losses = [
        [v["last_loss"] for kind, _, v in events if kind == "log"]
        for events in (events_one, events_many)
    ]
    assert losses[0] == losses[1]
    assert int(many.state.step) == 12


def test_the_records_values_are_plain_numbers():
    _, events = run()
    values = events[0][2]
    assert set(values) == {
        "loss", "size", "last_loss", "last_size", "averaged_steps", "loss_scale", "skipped_steps",
        "skipped_in_row", "steps_per_second",
    }  # fmt: skip
    assert all(type(v) in (int, float) for v in values.values())
    assert values["size"] == 2.0 and values["loss_scale"] == 1.0


def test_being_told_to_stop_saves_and_does_not_evaluate():
    calls = itertools.count(1)
    result, events = run(should_stop=lambda: next(calls) == 7)
    assert result.step == 7
    assert steps_of(events, "save")[-1] == 7
    assert steps_of(events, "eval") == [6]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_a_run_without_loss_scale(value):
    with pytest.raises(Diverged, match=r"the loss is (nan|-inf) at step 4"):
        run(value=value)


def test_too_many_skips_in_a_row_end_a_run_with_loss_scale():
    with pytest.raises(Diverged, match="8 steps in a row up to step 8"):
        run(
            value=float("nan"),
            policy="mixed_float16",
            skips_nonfinite=True,
            max_skipped_in_row=8,
        )


def scaled_run(batches, scale, *, every=5, limit=100, start=0):
    """A float16 run from a loss scale, over batches that may be NaN; what it logged."""
    stepper = jt.make_step(loss_fn, optax.sgd(0.1), "mixed_float16", loss_scale=scale)
    logged = []
    run_loop(
        stepper.step,
        stepper.init(jnp.ones(2)),
        iter(batches),
        start=start,
        stop=len(batches),
        steps_per_call=1,
        every=Every(every, 1000, 1000),
        log=lambda step, values, state: logged.append(values),
        evaluate=lambda step, state: None,
        checkpoint=lambda step, state, seconds: None,
        skips_nonfinite=True,
        max_skipped_in_row=limit,
    )
    return logged


BAD, GOOD = jnp.full(2, jnp.nan), jnp.ones(2)


def test_skips_at_the_lowest_scale_end_a_run_early():
    scale = jt.DynamicLossScale(4.0, min_loss_scale=2.0)
    with pytest.raises(
        Diverged, match=r"10 steps in a row up to step 10 .* may be \(2\)\)"
    ) as stop:
        scaled_run([BAD] * 100, scale)
    last: Any = stop.value.last
    assert last.step == 10 and last.skipped and last.loss_scale == 2.0
    assert last.batch is BAD  # a reference, no copy


def test_of_several_steps_in_a_call_the_last_ones_batch_is_kept():
    with pytest.raises(Diverged) as stop:
        run(per_call=4, every=(4, 4, 4), value=float("nan"))
    last: Any = stop.value.last
    assert last.step == 4 and not last.skipped and last.batch.shape == (2,)


@pytest.mark.parametrize(
    "scale,batches",
    [
        (jt.DynamicLossScale(4.0, min_loss_scale=2.0), [BAD] * 9 + [GOOD]),
        (jt.DynamicLossScale(4.0, min_loss_scale=2.0), [GOOD] * 6 + [BAD] * 9),
        (jt.DynamicLossScale(2.0**16), [BAD] * 15),  # it has not come down to 1 yet
        (jt.StaticLossScale(1.0), [BAD] * 15),
    ],
)
def test_a_few_skips_and_a_scale_that_can_still_fall_do_not(scale, batches):
    assert scaled_run(batches, scale)[-1]["skipped_steps"] == sum(b is BAD for b in batches)


@pytest.mark.parametrize("bad", [2, 5])  # records are of steps 5 and 10
def test_a_record_names_the_gradients_of_a_skip_since_the_last_record(bad):
    scale = jt.StaticLossScale(8.0)
    records = scaled_run([BAD if n == bad else GOOD for n in range(1, 11)], scale)
    assert records[0]["last_skipped_step"] == bad and records[0]["nonfinite_tensors"] == 1
    assert records[0]["nonfinite"] == [""]  # the parameters are one array, which has no path
    assert records[1]["skipped_steps"] == 1
    assert not {"last_skipped_step", "nonfinite", "nonfinite_tensors"} & set(records[1])


def test_the_step_that_went_wrong_first_is_found():
    losses = [{"loss": np.float32(x)} for x in (1, 2, "nan")]
    assert loop._first_bad(7, losses) == 7 and loop._first_bad(7, losses[:2]) == 7
    norm = [{"loss": np.float32(1), "grad_norm": np.float32("inf")}, *losses]
    assert loop._first_bad(7, norm) == 4
    calls = [{"loss": np.array(x), "grad_norm": np.ones(4)} for x in ([1] * 4, [1, 1, np.nan, 1])]
    assert loop._first_bad(8, calls) == 7 and loop._first_bad(8, []) == 8


def test_the_host_does_not_look_at_the_device_between_events(monkeypatch):
    # The step hands back objects that cannot be read at all, so any look at them would raise.
    looks = []
    values = {"last_loss": 1.0, "skipped_in_row": 0}
    monkeypatch.setattr(loop, "_add_calls", lambda *_: None)
    monkeypatch.setattr(loop, "_train_values", lambda *_: looks.append(1) or values)
    monkeypatch.setattr(loop, "_diverged", lambda *_: "")
    nothing = lambda *_: None
    result = run_loop(
        lambda state, batch: (object(), StepInfo(object(), None, None, object(), None)),
        object(),
        itertools.repeat(None),
        start=0,
        stop=100,
        steps_per_call=1,
        every=Every(30, 50, 60),
        log=nothing,
        evaluate=nothing,
        checkpoint=nothing,
    )
    assert result.step == 100
    assert len(looks) == 5  # at 30, 50, 60, 90 and 100


def test_a_diverged_state_is_neither_evaluated_nor_saved():
    events = []
    stepper = jt.make_step(loss_fn, optax.sgd(1.0))
    with pytest.raises(Diverged):
        run_loop(
            stepper.step,
            stepper.init(jnp.ones(2)),
            itertools.repeat(jnp.full(2, jnp.inf)),
            start=0,
            stop=1,
            steps_per_call=1,
            every=Every(1, 1, 1),
            log=lambda step, values, state: events.append("log"),
            evaluate=lambda step, state: events.append("evaluate"),
            checkpoint=lambda step, state, seconds: events.append("checkpoint"),
        )
    assert events == ["log"]


def test_parameters_that_the_last_update_made_infinite_end_the_run():
    # The loss of the last step is that of the parameters before it, so it cannot tell.
    with pytest.raises(Diverged, match="a parameter is not finite after step 1"):
        run(stop=1, value=1e38, every=(1, 1, 1), rate=1e30)


def test_one_skipped_step_at_a_log_point_does_not_end_the_run():
    stepper = jt.make_step(loss_fn, optax.sgd(0.1), "mixed_bfloat16", skip_nonfinite=True)
    batches = [jnp.full(2, jnp.nan) if n == 3 else jnp.ones(2) for n in range(8)]
    logged = []
    result = run_loop(
        stepper.step,
        stepper.init(jnp.ones(2)),
        iter(batches),
        start=0,
        stop=8,
        steps_per_call=1,
        every=Every(4, 8, 8),
        log=lambda step, values, state: logged.append((step, values["skipped_steps"])),
        evaluate=lambda step, state: None,
        checkpoint=lambda step, state, seconds: None,
        skips_nonfinite=True,
    )
    assert result.step == 8 and logged == [(4, 1), (8, 1)]


def test_rates_and_times_leave_events_out(monkeypatch):
    # A clock that only the stand-ins move: a step takes 1 s, an evaluation 100 s, a save 1,000 s.
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loop, "_diverged", lambda *_: "")
    monkeypatch.setattr(loop, "_add_calls", lambda *_: None)
    monkeypatch.setattr(loop, "_train_values", lambda *_: {})

    def passes(seconds, result=None):
        def stand_in(*_):
            now[0] += seconds
            return result

        return stand_in

    rates, saved = [], []
    result = run_loop(
        passes(1.0, (None, StepInfo(None, None, None, None, None))),
        None,
        itertools.repeat(None),
        start=0,
        stop=12,
        steps_per_call=2,
        every=Every(4, 6, 6),
        log=lambda step, values, state: rates.append(values["steps_per_second"]),
        evaluate=passes(100.0),
        checkpoint=lambda step, state, seconds: saved.append((passes(1000.0)(), seconds)),
    )
    assert result.seconds == 6.0
    assert rates == [2.0, 2.0, 2.0]
    assert [seconds for _, seconds in saved] == [3.0, 6.0]
