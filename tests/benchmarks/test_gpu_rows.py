"""The GPU benchmark's rows: what is timed and counted, and that rivals train the same network."""

import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.marks import slow

from benchmarks.gpu import jax_rows, measure
from benchmarks.gpu.measure import Trainer
from benchmarks.gpu.table import Row, workload
from jmp_train._jaxpr.flops import OTHER, flops_by_dtype

MLP, GPT = workload("mlp_wide", True), workload("gpt_124m", True)


@pytest.fixture(autouse=True)
def own_precision():
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but where a step of `counting` moves it."""
    now = [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def counting(clock, seconds=1e-3, losses=lambda n: float(n), steps_per_call=1):
    """A trainer whose loss is the number of its step, of which every tenth is skipped."""
    steps = itertools.count(steps_per_call, steps_per_call)
    taken = [0]

    def step(batch):
        taken[0] = next(steps)
        clock[0] += seconds(taken[0]) if callable(seconds) else seconds
        return losses(taken[0])

    return Trainer(
        step, lambda b: b, float, lambda: 7, lambda: taken[0] // 10, 5, None, steps_per_call
    )


def test_step_times_are_quartiles_after_warm_up(clock):
    # Step n takes n ms, from 4 to 100; the first three, which compile, a second.
    seconds = lambda n: 1.0 if n <= measure.WARMUP else 1e-3 * n
    found = measure.run(counting(clock, seconds), MLP, 64, 60.0)
    step = found["step_ms"]
    assert [step[k] for k in ("q1", "median", "q3")] == pytest.approx([27.5, 52, 76.5])
    assert step["steps"] == 100 - measure.WARMUP
    assert found["per_second"] == pytest.approx(64e3 / step["median"])
    assert found["compile_s"] == pytest.approx(1.0)


def test_short_steps_are_timed_in_groups(clock):
    found = measure.run(counting(clock, 1e-3), MLP, 64, 60.0, group_s=0.05)
    assert found["step_ms"]["steps"] == pytest.approx(20 * 50, abs=20)
    assert found["step_ms"]["median"] == pytest.approx(1.0)


def test_losses_are_those_of_their_steps(clock):
    found = measure.run(counting(clock), MLP, 64, 60.0)
    assert (found["loss_first"], found["loss_100"], found["losses"]["20"]) == (1, 100, 20)
    assert found["skipped"] == 10  # of the first hundred, however many more were timed


def test_calls_of_fifty_steps_know_their_hundredth(clock):
    found = measure.run(counting(clock, steps_per_call=50), MLP, 8, 60.0)
    assert (found["loss_first"], found["loss_100"], found["skipped"]) == (None, 100, 10)


def test_a_slow_row_stops_at_twenty_timed_steps(clock):
    found = measure.run(counting(clock, 5.0), MLP, 8, 60.0)
    assert (found["step_ms"]["steps"], found["loss_100"]) == (20, None)


def test_a_loss_that_is_not_finite_is_no_result(clock):
    losses = lambda n: math.nan if n == 50 else 1.0
    with pytest.raises(FloatingPointError, match="step 50 is nan"):
        measure.run(counting(clock, losses=losses), MLP, 8, 60.0)


def test_batches_are_the_same_for_every_program():
    for work in (MLP, GPT, workload("resnet50", True)):
        first, second = (list(itertools.islice(measure.batches(work, 4), 3)) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert all((a[k] == b[k]).all() for k in a)
        assert any((first[0][k] != first[1][k]).any() for k in first[0])
    from pydoc_data.topics import topics

    text = "".join(topics[k] for k in sorted(topics)).encode()
    assert bytes(next(measure.batches(GPT, 4))["tokens"].astype(np.uint8)[2]) in text


def product_flops(jaxpr):
    """2 m n k of every matrix product of a program, loops counted as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * inner * eqn.outvars[0].aval.size
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        inner = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(eqn.params.values()))]
        total += times * sum(product_flops(j) for j in inner if hasattr(j, "eqns"))
    return total


@pytest.mark.parametrize("work", [MLP, GPT], ids=lambda w: w.name)
def test_model_flops_are_those_of_the_products(work):
    task = jax_rows.task_of(Row(work.name, "fp32", "jmp_train"), work)
    params = task.init(jax.random.key(0))[0]
    batch = next(measure.batches(work, 4))
    jaxpr = jax.make_jaxpr(lambda p: task.loss_fn(p, batch)[0])(params)
    tokens = 4 * work.length if work.kind == "gpt" else 4
    flops = 3 * product_flops(jaxpr.jaxpr)  # the backward pass is two forward ones
    matrices = sum(x.size for x in jax.tree.leaves(params) if x.size > 4 * work.width)
    assert work.flops(matrices) * tokens == flops


@pytest.mark.parametrize("toy", [True, slow(False)])
@pytest.mark.parametrize("name", ["resnet50", "vit_b"])
def test_multiplications_of_networks_for_images_are_those_of_their_programs(name, toy):
    work = workload(name, toy)
    task = jax_rows.task_of(Row(name, "fp32", "jmp_train"), work)
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    shape = (1, work.features, work.features, 3)
    batch = {"image": np.zeros(shape, np.float32), "label": np.zeros(1, np.int32)}
    options = {} if model_state is None else {"model_state": model_state}
    loss = lambda p, o: task.loss_fn(p, batch, **o)[0]
    counted = flops_by_dtype(jax.make_jaxpr(loss)(params, options).jaxpr)
    # What is not a product or a convolution is counted by itself.
    products = sum(n for dtype, n in counted.items() if dtype != OTHER)
    assert work.flops(0) == 3 * products
    if not toy:  # published: 4.1e9 and 17.5e9
        published = {"resnet50": 4.1, "vit_b": 17.5}
        assert products / 2e9 == pytest.approx(published[name], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_124m", "mlp_wide"])
@pytest.mark.parametrize("precision,tolerance", [("fp32", 1e-5), ("bf16", 2e-3), ("fp16", 1e-3)])
def test_hand_written_step_trains_the_same_network(name, precision, tolerance):
    # float32: another order of sums. Halves: a few roundings (2^-9, 2^-11) of a loss of 3 to 6.
    work, losses = workload(name, True), []
    for program in ("jmp_train", "hand-written JAX"):
        trainer = jax_rows.make(Row(name, precision, program), work, 8, True)
        batches = measure.batches(work, 8)
        losses.append([trainer.wait(trainer.step(trainer.put(next(batches)))) for _ in range(8)])
    np.testing.assert_allclose(*losses, rtol=tolerance)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
def test_fitting_batch_is_the_largest_that_needs_sixty_percent():
    row = Row("gpt_124m", "fp32", "jmp_train")
    task = jax_rows.task_of(row, GPT)
    step = jax_rows._ours(row, GPT, task)
    state = step.init(*task.init(jax.random.key(0)))

    def needed(batch):
        tokens = jnp.zeros((batch, GPT.length + 1), jnp.int32)
        return jax_rows.needed_memory(step.step.lower(state, {"tokens": tokens}).compile())

    between = (needed(8) + needed(16)) / 2
    assert jax_rows.fitting_batch(GPT, round(between / 0.6), 256) == 8
    assert jax_rows.fitting_batch(GPT, 2**40, 64) == 64
