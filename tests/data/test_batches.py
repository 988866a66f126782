"""Batches: every example once an epoch, reshuffled, resumable, and a pure function of the seed."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmp_train.data import Arrays, eval_batches, iterate, train_batches
from jmp_train.data.batches import iterate_rows, saved_state, state_at
from jmp_train.data.order import Order


def arrays(size):
    return {"x": np.arange(size), "y": np.arange(size) * 10.0}


def source(size, augment=None):
    return Arrays(arrays(size), augment)


def take(batches, n):
    iterator = batches if hasattr(batches, "__next__") else iterate(batches)
    return [next(iterator) for _ in range(n)]


@settings(deadline=None, max_examples=25)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**63 - 1))
def test_each_epoch_holds_every_example_once(size, batch_size, seed):
    epochs = 3
    steps = -(-epochs * size // batch_size)
    seen = take(train_batches(source(size), batch_size, seed=seed), steps)
    assert all(batch["x"].shape == (batch_size,) for batch in seen)
    order = np.concatenate([batch["x"] for batch in seen])[: epochs * size].reshape(epochs, size)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(size), (epochs, 1)))
    for batch in seen:
        np.testing.assert_array_equal(batch["y"], batch["x"] * 10.0)


def test_epochs_and_seeds_differ_in_order():
    runs = [take(train_batches(source(100), 100, seed=s), 2) for s in (0, 0, 1)]
    orders = [[tuple(batch["x"]) for batch in run] for run in runs]
    assert orders[0] == orders[1]
    assert len({orders[0][0], orders[0][1], orders[2][0], orders[2][1]}) == 4


@pytest.mark.parametrize("per_call", [1, 3])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_restored_iterator_continues_bitwise_noise_included(at, per_call):
    def augment(batch, rng):
        return {**batch, "y": batch["y"] + rng.normal(size=batch["y"].shape)}

    def make():
        return iterate(train_batches(source(10, augment), 4, seed=5), per_call)

    first = make()
    take(first, at)
    state = first.get_state()
    second = make()
    second.set_state(state)
    for a, b in zip(take(first, 10), take(second, 10), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_several_steps_a_call_are_the_same_batches_stacked():
    one = take(train_batches(source(10), 4, seed=1), 6)
    stacked = take(iterate(train_batches(source(10), 4, seed=1), 3), 2)
    got = list(itertools.chain(*(batch["x"] for batch in stacked)))
    np.testing.assert_array_equal(got, [batch["x"] for batch in one])


def test_evaluation_batches_have_one_shape_and_mark_the_padding():
    batches = list(eval_batches(arrays(10), 4))
    assert [batch["mask"].tolist() for batch in batches] == [[True] * 4] * 2 + [
        [True, True, False, False]
    ]
    unmasked = np.concatenate([batch["x"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(unmasked, np.arange(10))
    assert {batch["x"].shape for batch in batches} == {(4,)}


def noise_of(seed, index):
    def augment(batch, rng):
        return {**batch, "noise": rng.normal(size=3)}

    return tuple(train_batches(source(6, augment), 2, seed=seed)[index]["noise"])


def test_batches_and_seeds_differ_in_noise():
    drawn = [noise_of(seed, index) for seed in (0, 1) for index in (0, 1, 7)]
    assert len(set(drawn)) == 6
    assert noise_of(1, 7) == drawn[-1]


def test_the_noise_is_not_the_stream_that_the_order_was_drawn_from():
    # With one stream for both, the augmenting generator of batch 0 would repeat epoch 0's order.
    orders = []

    def augment(batch, rng):
        orders.append(tuple(rng.permutation(50)))
        return batch

    batch = train_batches(source(50, augment), 50, seed=3)[0]
    assert tuple(batch["x"]) != orders[0]


def test_only_the_epochs_at_hand_are_kept_in_memory():
    order = Order(10, 10, seed=0)
    for i in range(100):
        order.rows(i, batches=1)
    assert len(order._epochs) <= 3


@pytest.mark.parametrize("batch_size,per_call", [(3, 4), (10, 3), (25, 2), (4, 1)])
def test_rows_are_those_of_the_batches_in_memory(batch_size, per_call):
    batches = train_batches(source(10), batch_size, seed=7)
    rows = iterate_rows(Order(10, batch_size, seed=7), per_call)
    rows.skip(1)
    found = np.concatenate([np.ravel(item) for item in take(rows, 3)])
    expected = np.concatenate([batches[n]["x"] for n in range(1, 3 * per_call + 1)])
    np.testing.assert_array_equal(found, expected)
    assert rows.get_state() == state_at(1 + 3 * per_call)


@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_an_iterator_is_where_state_at_puts_it(steps_per_call):
    made = train_batches(source(10), 3, seed=0)
    walked, put = iterate(made, steps_per_call), iterate(made, steps_per_call)
    take(walked, 4)
    put.set_state(state_at(4 * steps_per_call))
    assert put.get_state() == walked.get_state()
    for a, b in zip(take(put, 2), take(walked, 2), strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])


@pytest.mark.parametrize("before,after", [(1, 3), (3, 1), (2, 5)])
def test_a_position_serves_any_number_of_steps_per_call(before, after):
    made = train_batches(source(10), 3, seed=0)
    first, second = iterate(made, before), iterate(made, after)
    take(first, 2)
    second.set_state(first.get_state())
    rows = np.ravel(next(second)["x"])
    expected = [made[2 * before + n]["x"] for n in range(after)]
    np.testing.assert_array_equal(rows, np.ravel(expected))


def test_an_earlier_versions_position_counted_calls():
    assert saved_state({"next_index": 4}, {"steps_per_call": 5}) == state_at(20)
    assert saved_state(state_at(4), {"steps_per_call": 5}) == state_at(4)


def test_skipped_batches_are_never_made():
    drawn = []

    def augment(batch, rng):
        drawn.append(tuple(batch["x"]))
        return batch

    made = train_batches(source(1000, augment), 2, seed=0)
    batches = iterate(made)
    batches.skip(3)
    expected = iterate(made)
    expected.set_state(state_at(3))
    np.testing.assert_array_equal(next(batches)["x"], next(expected)["x"])
    first = train_batches(source(1000), 2, seed=0)[0]["x"]
    assert tuple(first) not in drawn


class Breaking(Arrays):
    """Arrays of which the seventh batch cannot be drawn."""

    def draw(self, rows, rng):
        if 7 * 2 in rows:
            raise ValueError("batch 7 is broken")
        return super().draw(rows, rng)


def test_batches_before_one_that_cannot_be_made_are_returned():
    made = train_batches(Breaking({"x": np.arange(100)}), 2, seed=0)
    broken = next(i for i in range(50) if 14 in train_batches(source(100), 2, seed=0)[i]["x"])
    batches = iterate(made)
    for index in range(broken):
        np.testing.assert_array_equal(
            next(batches)["x"], train_batches(source(100), 2, seed=0)[index]["x"]
        )
    with pytest.raises(ValueError, match="batch 7 is broken"):
        next(batches)
    assert batches.get_state() == state_at(broken)
