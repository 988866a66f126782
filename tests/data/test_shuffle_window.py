"""Windows of a stream: shuffled within, anew in each pass, and resumed at any position."""

import json

import grain
import numpy as np
import pytest
from helpers.marks import first_quick

import jmp_train as jt
from jmp_train.data import DataError, iterate, train_batches

COUNT = 40


def loaded(window, workers=0):
    rows = [{"x": np.float32(i)} for i in range(COUNT)]
    make = lambda: (grain.MapDataset.source(rows).to_iter_dataset(), rows)
    return jt.Data(make, window=window, workers=workers).load()


def batches_of(window, *, seed=0, workers=0, size=8):
    train = loaded(window, workers).train
    return iterate(train_batches(train, size, seed=seed, workers=workers))


def numbers(batches, count):
    found = [next(batches)["x"].astype(int).tolist() for _ in range(count)]
    return np.array(found)


@pytest.mark.parametrize("window", [2, 16, 40, 100])
def test_an_example_stays_in_its_window_and_comes_once_a_pass(window):
    batches = batches_of(window)
    passes = numbers(batches, 10).reshape(2, COUNT)
    batches.close()
    for order in passes:
        np.testing.assert_array_equal(np.sort(order), np.arange(COUNT))
        np.testing.assert_array_equal(order // window, np.arange(COUNT) // window)
    assert (passes[0] != passes[1]).any() and (passes[0] != np.arange(COUNT)).any()


def test_the_order_depends_on_the_seed_alone():
    orders = []
    for seed in (0, 0, 1):
        batches = batches_of(16, seed=seed)
        orders.append(numbers(batches, 5))
        batches.close()
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()


@pytest.mark.parametrize("workers", first_quick((0, 2)))
@pytest.mark.parametrize("window", [5, 16])
def test_every_position_resumes(window, workers):
    whole = batches_of(window, workers=workers, size=4)
    states, rest = [], []
    for _ in range(12 if not workers else 5):
        states.append(json.loads(json.dumps(whole.get_state())))
        rest.append(numbers(whole, 1)[0])
    whole.close()
    again = batches_of(window, workers=workers, size=4)
    for place, state in list(enumerate(states))[:: 1 if not workers else 3]:
        again.set_state(state)
        np.testing.assert_array_equal(
            numbers(again, len(rest) - place), rest[place:], err_msg=str(place)
        )
    assert again.replayed == 0
    again.close()


def test_held_out_streams_keep_their_order_and_functions_have_no_windows():
    held_out, _ = next(iter([loaded(16).eval.held_out(0, COUNT)]))
    np.testing.assert_array_equal(held_out["x"], np.arange(COUNT))
    with pytest.raises(DataError, match="window is 4, and the data are batches that a function"):
        jt.Data(lambda: (lambda batch_size: iter([]), [{"x": 1.0}]), window=4).load()
    with pytest.raises(ValueError, match="window is -1; expected 0 or more"):
        jt.Data(list, window=-1)
