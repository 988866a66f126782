"""Examples that cannot be used: left out, counted and named, at random, in streams and in workers."""

import grain
import numpy as np
import pytest
from helpers.marks import first_quick

import jmp_train as jt
from jmp_train.data import DataError, iterate, train_batches
from jmp_train.data.batches import eval_batches

COUNT = 30
BAD = {3, 4, 17}


class Items:
    """Examples of which some cannot be read, in one of several ways."""

    def __init__(self, how="unreadable", bad=frozenset(BAD)):
        self.how, self.bad = how, bad

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        good = {"x": np.full(2, index, np.float32), "label": index % 3}
        if index not in self.bad:
            return good
        if self.how == "unreadable":
            raise OSError("damaged")
        if self.how == "other":
            return {**good, "x": np.zeros(3, np.float32)}
        if self.how == "label":
            return {**good, "label": 9}
        return {**good, "x": "text"}


def data(items, **options):
    return jt.Data(lambda: (items, items), classes=3, on_bad="skip", **options).load()


def numbers(batch):
    return batch["x"][:, 0].astype(int).tolist()


@pytest.mark.parametrize("how", ["unreadable", "other", "label", "text"])
def test_the_next_good_example_takes_the_place_of_a_bad_one(how):
    batches = iterate(train_batches(data(Items(how)).train, 10, seed=0))
    whole = iterate(train_batches(data(Items(bad=frozenset())).train, 10, seed=0))
    replaced = {3: 5, 4: 5, 17: 18}
    for epoch in range(1, 3):
        for _ in range(3):
            expected = [replaced.get(n, n) for n in numbers(next(whole))]
            batch = next(batches)
            assert numbers(batch) == expected and batch.keys() == {"x", "label"}
        assert batches.bad.count == 3 * epoch
    assert "example" in batches.bad.why and any(f" {n}" in batches.bad.why for n in BAD)
    whole.close()
    batches.close()


def test_held_out_examples_that_are_bad_do_not_count():
    left_out = []
    found = list(eval_batches(data(Items()).eval, 8, left_out.append))
    kept = [n for batch in found for n, real in zip(numbers(batch), batch["mask"]) if real]
    assert kept == [n for n in range(COUNT) if n not in BAD]
    assert sum(bad.count for bad in left_out) == 3 and "example 3" in left_out[0].why


def test_a_disk_that_vanished_ends_the_run():
    items = Items()
    loaded = data(items)
    items.bad = frozenset(range(COUNT))
    batches = iterate(train_batches(loaded.train, 4, seed=0))
    with pytest.raises(
        DataError, match="^30 examples in a row cannot be read, the first: example "
    ):
        next(batches)
    batches.close()


@pytest.mark.parametrize("workers", first_quick((0, 2)))
def test_the_count_is_part_of_the_position(workers):
    loaded = data(Items(), workers=workers)
    make = lambda: iterate(train_batches(loaded.train, 10, seed=0, workers=workers), 2)
    batches = make()
    next(batches)
    state = batches.get_state()
    assert state["skipped_examples"] == batches.bad.count > 0
    rest = [next(batches) for _ in range(2)]
    again = make()
    again.set_state(state)
    for item in rest:
        np.testing.assert_array_equal(next(again)["x"], item["x"])
    assert again.bad.count == batches.bad.count
    batches.close()
    again.close()


def double(example):
    if int(example["label"]) == 2 and example["x"][0] == 8:
        raise ValueError("no doubling")
    return {**example, "x": 2 * example["x"]}


def stream(**options):
    arrays = [{"x": np.full(2, n, np.float32), "label": n % 3} for n in range(COUNT)]
    arrays[5] = {**arrays[5], "label": 7}
    arrays[6] = {**arrays[6], "x": np.zeros(1, np.float32)}
    made = lambda: (grain.MapDataset.source(arrays).to_iter_dataset(),) * 2
    return jt.Data(made, classes=3, on_bad="skip", transform=double, **options).load()


@pytest.mark.parametrize("workers", first_quick((0, 2)))
def test_a_stream_leaves_out_what_cannot_be_used(workers):
    loaded = stream(workers=workers)
    batches = iterate(train_batches(loaded.train, 9, seed=0, workers=workers))
    seen = [n // 2 for _ in range(3 if not workers else 1) for n in numbers(next(batches))]
    assert not {5, 6, 8} & set(seen)
    if not workers:
        assert seen == [n for n in range(COUNT) if n not in (5, 6, 8)]
        assert batches.bad.count == 3 and "label" in batches.bad.why
        assert batches.get_state()["skipped_examples"] == 3
    batches.close()


def test_a_held_out_stream_leaves_them_out_too():
    left_out = []
    found = list(eval_batches(stream().eval, 8, left_out.append))
    kept = [n // 2 for batch in found for n, real in zip(numbers(batch), batch["mask"]) if real]
    assert kept == [n for n in range(COUNT) if n not in (5, 6, 8)]
    assert sum(bad.count for bad in left_out) == 3


def test_batches_of_a_function_cannot_leave_examples_out():
    made = lambda: (lambda batch_size: iter([]), [{"x": 1.0}])
    with pytest.raises(DataError, match="on_bad is skip, and the data are batches that a function"):
        jt.Data(made, on_bad="skip").load()
    with pytest.raises(ValueError, match="on_bad"):
        jt.Data(made, on_bad="ignore")


def test_the_first_example_of_the_data_says_what_the_others_have_to_be_like():
    rows = [{"x": np.full(3, n, np.float32)} for n in range(40)]
    rows[20] = {"x": np.zeros(5, np.float32)}
    loaded = jt.Data(
        lambda: (grain.MapDataset.source(rows).to_iter_dataset(), rows[:4]), on_bad="skip"
    )
    train = loaded.load().train
    whole = iterate(train_batches(train, 4, seed=0))
    for _ in range(5):
        next(whole)
    resumed = iterate(train_batches(loaded.load().train, 4, seed=0))
    resumed.set_state(whole.get_state())  # the next example is the odd one
    np.testing.assert_array_equal(next(resumed)["x"], next(whole)["x"])
    assert resumed.bad.count == whole.bad.count == 1
    whole.close()
    resumed.close()


def test_bad_examples_after_the_last_batch_of_a_pass_count():
    def refuse(example):
        if example["x"][0] in (2, 9):
            raise ValueError("bad")
        return example

    rows = [{"x": np.full(3, n, np.float32)} for n in range(10)]
    make = lambda: (grain.MapDataset.source(rows).to_iter_dataset(),) * 2
    loaded = jt.Data(make, transform=refuse, on_bad="skip").load()
    left_out = []
    list(eval_batches(loaded.eval, 4, left_out.append))
    assert sum(bad.count for bad in left_out) == 2
    batches = iterate(train_batches(loaded.train, 4, seed=0))
    for _ in range(5):  # two passes of two batches, and one of the third
        next(batches)
    assert batches.bad.count == 5
    batches.close()


def test_many_bad_examples_that_do_not_follow_each_other_do_not_end_a_stream():
    def refuse(example):
        if example["x"] % 5 == 4:
            raise ValueError("bad")
        return example

    rows = [{"x": np.float32(n)} for n in range(2000)]
    make = lambda: (grain.MapDataset.source(rows).to_iter_dataset(), rows[:3])
    batches = iterate(
        train_batches(jt.Data(make, transform=refuse, on_bad="skip").load().train, 600, seed=0)
    )
    next(batches)
    assert batches.bad.count == 149
    batches.close()


def test_what_a_stream_of_grain_cannot_read_ends_the_run():
    """Grain's iterators cannot be read further, nor resumed, after an error."""
    made = lambda: (grain.MapDataset.source(Items()).to_iter_dataset(), [Items()[0]])
    batches = iterate(
        train_batches(jt.Data(made, classes=3, on_bad="skip").load().train, 3, seed=0)
    )
    next(batches)
    with pytest.raises(DataError, match="batch 1 cannot be read: OSError: damaged"):
        next(batches)
    batches.close()


def test_a_source_with_a_take_of_its_own_is_read_one_at_a_time():
    class Taking(Items):
        blocks = 3

        def take(self, count):
            raise TypeError("another take")

    loaded = jt.Data(lambda: Taking(bad=frozenset()), classes=3).load()
    assert loaded.train.draw(np.arange(5), np.random.default_rng(0))["x"].shape == (5, 2)


def test_interleaved_streams_resume_in_later_passes():
    parts = [[{"x": np.float32(n + 100 * p)} for n in range(20)] for p in range(2)]

    def made():
        sources = [grain.MapDataset.source(part).to_iter_dataset() for part in parts]
        mixed = grain.experimental.InterleaveIterDataset(sources, cycle_length=2)
        return mixed, parts[0]

    train = jt.Data(made).load().train
    batches = iterate(train_batches(train, 4, seed=0))
    states, seen = [], []
    for _ in range(25):
        states.append(batches.get_state())
        seen.append(next(batches)["x"].tolist())
    batches.close()
    for place in (3, 11, 13, 21):
        again = iterate(train_batches(train, 4, seed=0))
        again.set_state(states[place])
        assert [next(again)["x"].tolist() for _ in range(25 - place)] == seen[place:], place
        again.close()


def test_labels_in_memory_that_are_no_class_are_left_out():
    x = np.arange(40, dtype=np.float32)
    arrays = {"x": x, "label": np.where(x == 6, -1, np.arange(40) % 2)}
    own = jt.Data(arrays, on_bad="skip", eval_share=0.25).load()
    batches = iterate(train_batches(own.train, 10, seed=0))
    seen = np.concatenate([next(batches)["x"] for _ in range(3)])
    assert own.spec.classes == 2 and 6 not in seen and len(seen) == 30
    assert batches.bad.count == 1 and "'label' is -1" in batches.bad.why
    batches.close()
    with pytest.raises(DataError, match="1 labels are out of range, the first -1"):
        jt.Data(arrays, eval_share=0.25).load()


def test_a_bad_first_held_out_example_does_not_say_what_the_others_are_like():
    held_out = Items("other", bad=frozenset([0]))
    own = jt.Data(lambda: (Items(bad=frozenset()), held_out), classes=3, on_bad="skip").load()
    (batch,) = eval_batches(own.eval, COUNT)
    assert numbers(batch)[: int(batch["mask"].sum())] == list(range(1, COUNT))


@pytest.mark.parametrize(
    "settings,given",
    [({"on_bad": "skip"}, "on_bad"), ({"window": 5}, "window"), ({"eval_share": 0.5}, "eval_share"),
     ({"classes": 3}, "classes"), ({"transform": double}, "transform")],
)  # fmt: skip
def test_a_setting_that_a_returned_dataset_cannot_honour_is_refused(settings, given):
    made = data(Items())
    assert jt.Data(lambda: made).load().spec == made.spec
    with pytest.raises(DataError, match=f"returned a Dataset; expected no {given} beside it"):
        jt.Data(lambda: made, **settings).load()
    taken = jt.Data(lambda window=0: made, window=5).load()
    assert taken.spec == made.spec
