"""Data of a user in each accepted form: the same examples, the right spec, errors in one line."""

import functools
import re

import grain
import numpy as np
import pytest

import jmp_train as jt
from jmp_train.data import DataError, Dataset, eval_batches, iterate, train_batches

COUNT, BATCH = 30, 4


def arrays():
    return {"id": np.arange(COUNT), "x": np.arange(COUNT * 3.0).reshape(COUNT, 3)}


def items():
    return [{"id": i, "x": np.arange(3.0) + 3 * i} for i in range(COUNT)]


def batches_of(rows, batch_size):
    for start in range(0, len(rows), batch_size):
        part = np.asarray(rows[start : start + batch_size])
        yield {"id": part, "x": np.arange(3.0) + 3 * part[:, None]}


def functions():
    train, held_out = np.arange(24), np.arange(24, 30)
    return functools.partial(batches_of, train, BATCH), functools.partial(batches_of, held_out, 5)


FORMS = {
    "arrays": arrays,
    "list": items,
    "map dataset": lambda: grain.MapDataset.source(items()),
    "iter dataset": lambda: (
        grain.MapDataset.source(items()[:24]).shuffle(3).to_iter_dataset(),
        items()[24:],
    ),
    "two iter datasets": lambda: (
        grain.MapDataset.source(items()[:24]).to_iter_dataset(),
        grain.MapDataset.source(items()[24:]).to_iter_dataset(),
    ),
    "functions": functions,
}


def loaded(form, **options):
    return jt.Data(FORMS[form], **options).load()


def take(dataset, count, *, seed=0, workers=0):
    iterator = iterate(train_batches(dataset.train, BATCH, seed=seed, workers=workers))
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("form", FORMS)
def test_train_and_held_out_examples_are_each_read_once(form):
    dataset = loaded(form)
    trained = np.concatenate([batch["id"] for batch in take(dataset, 24 // BATCH)])
    held_out = [batch["id"][batch["mask"]] for batch in eval_batches(dataset.eval, BATCH)]
    np.testing.assert_array_equal(np.sort(np.concatenate([trained, *held_out])), np.arange(COUNT))
    assert len(set(trained.tolist())) == 24


@pytest.mark.parametrize("form", FORMS)
def test_arrays_of_an_example_stay_together_in_32_bits(form):
    for batch in take(loaded(form), 3):
        expected = np.arange(3, dtype=np.float32) + 3 * np.asarray(batch["id"])[:, None]
        np.testing.assert_array_equal(batch["x"], expected)
    spec = loaded(form).spec
    assert spec.example["x"].shape == (3,) and spec.example["x"].dtype == np.float32
    assert spec.example["id"].dtype == np.int32


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_batches_of_every_form_have_one_shape(form):
    batches = list(eval_batches(loaded(form).eval, 4))
    assert {batch["x"].shape for batch in batches} == {(4, 3)}
    assert [int(batch["mask"].sum()) for batch in batches] == [4, 2]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", [1, 5, 8])
def test_a_restored_position_continues_bitwise_in_every_form(form, at):
    options = {"batch_transform": lambda batch, rng: {**batch, "noise": rng.normal(size=BATCH)}}
    if form != "functions":
        options["transform"] = lambda example, rng: {**example, "own": rng.normal()}
    dataset = loaded(form, **options)
    made = train_batches(dataset.train, BATCH, seed=1)
    first, second = iterate(made), iterate(made)
    for _ in range(at):
        next(first)
    second.set_state(first.get_state())
    assert second.replayed == (at if form == "functions" else 0)
    for _ in range(8):
        a, b = next(first), next(second)
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["list", "map dataset"])
def test_batches_do_not_depend_on_the_number_of_workers(form):
    options = {"transform": lambda example, rng: {**example, "own": rng.normal()}}
    alone = take(loaded(form, **options), 5)
    for a, b in zip(alone, take(loaded(form, **options), 5, workers=2), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_random_numbers_differ_between_examples_and_epochs():
    options = {"transform": lambda example, rng: {**example, "own": rng.normal()}}
    drawn = np.concatenate([batch["own"] for batch in take(loaded("list", **options), 18)])
    assert len(set(drawn.tolist())) == 72  # three epochs


def test_a_deterministic_transform_is_evaluated_and_a_random_one_not():
    fixed = loaded("list", transform=lambda example: {**example, "x": -example["x"]})
    seeded = loaded("list", transform=lambda example, rng: {**example, "x": -example["x"]})
    assert next(eval_batches(fixed.eval, 6))["x"].max() <= 0
    assert next(eval_batches(seeded.eval, 6))["x"].min() >= 0


def test_processes_divide_each_batch_without_overlap():
    dataset = loaded("list")
    whole = take(dataset, 1)[0]["id"]
    parts = []
    for rows in np.split(np.arange(BATCH), 2):
        parts.append(next(iterate(train_batches(dataset.train, BATCH, seed=0, rows=rows)))["id"])
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("form,of", [("list", "example"), ("list", "batch"), ("arrays", "batch")])
def test_a_part_of_a_batch_has_the_random_numbers_of_the_whole(form, of):
    noise = lambda example, rng: {**example, "x": rng.normal(size=3)}
    augment = lambda batch, rng: {**batch, "x": rng.normal(size=batch["x"].shape)}
    own = {"transform": noise} if of == "example" else {"batch_transform": augment}
    train = loaded(form, **own).train
    whole = next(iterate(train_batches(train, BATCH, seed=0)))["x"]
    rows = np.arange(BATCH)[BATCH // 2 :]
    part = next(iterate(train_batches(train, BATCH, seed=0, rows=rows)))["x"]
    np.testing.assert_array_equal(part, whole[rows])


def test_classes_are_found_from_labels_in_memory_alone():
    labelled = {"x": np.ones((12, 2)), "label": np.arange(12) % 3}
    assert jt.Data(labelled).load().spec.classes == 3
    assert jt.Data(labelled, classes=5).load().spec.classes == 5
    assert jt.Data({**labelled, "label": np.arange(12) % 3 + 1}).load().spec.class_count is None
    with pytest.raises(ValueError, match="number of classes is unknown; expected Data"):
        loaded("list").spec.classes  # noqa: B018


def test_the_function_is_not_called_before_load():
    called = []

    def load(path: str = "a"):
        called.append(path)
        return arrays()

    data = jt.Data(load, path="b")
    assert data.path == "b" and not called
    data.load()
    assert called == ["b"]
    with pytest.raises(ValueError, match="no argument 'pth'; did you mean 'path'"):
        jt.Data(load, pth="c")


def raising():
    raise OSError("the disk is gone")


def broken():
    raise KeyError("x")


@pytest.mark.parametrize(
    "made,line",
    [
        ([], "returned no examples"),
        ({"x": np.ones((0, 2))}, "returned no examples"),
        (
            [(1, 2)] * 9,
            r"example \d is a tuple of 2; expected a dict of arrays by name, such as trans",
        ),
        ([3] * 9, r"example \d is 3; expected a dict"),
        ({"x": np.ones(9), "y": np.ones(8)}, "'x' has 9, 'y' has 8 examples; expected the same"),
        ({"x": np.array([None] * 9)}, "'x' has Python objects; expected numbers"),
        ({"x": np.array(["a"] * 9)}, "'x' has dtype <U1; expected numbers"),
        ({"x": np.arange(9) + 2**40}, "'x' has integers beyond 32 bits"),
        (3.5, "returned a float; expected a dict of arrays"),
        (iter([]), "an iterator cannot start again"),
        ([{"x": 1}], "eval_share 0.2 of 1 examples is 0"),
        (grain.MapDataset.source(items()).repeat(), "expected it without repeat"),
        (grain.MapDataset.source(items()).to_iter_dataset(), "a stream cannot be split"),
        ((grain.MapDataset.source(items()).filter(lambda e: False), items()), "was filtered out"),
    ],
)
def test_bad_data_are_one_line(made, line):
    with pytest.raises(DataError, match=line) as error:
        jt.Data(lambda: made).load()
    assert "\n" not in str(error.value)


def test_a_function_that_raises_is_named_and_a_bug_keeps_its_traceback():
    with pytest.raises(DataError, match="raising failed: OSError: the disk is gone"):
        jt.Data(raising).load()
    with pytest.raises(KeyError):
        jt.Data(broken).load()


def test_examples_of_other_shapes_are_named():
    ragged = [{"x": np.ones(2 + (i == 7))} for i in range(9)]
    dataset = jt.Data(lambda: (ragged, ragged[:3])).load()
    with pytest.raises(DataError, match=re.escape("'x' has the shape (")) as error:
        next(iterate(train_batches(dataset.train, 9, seed=0)))
    assert "example 7" in str(error.value)


def test_a_stream_below_the_batch_size_is_refused():
    short = grain.MapDataset.source(items()[:3]).to_iter_dataset()
    dataset = jt.Data(lambda: (short, items())).load()
    with pytest.raises(DataError, match="no whole batch; expected a smaller --batch-size"):
        next(iterate(train_batches(dataset.train, BATCH, seed=0)))


def test_a_dataset_is_taken_as_it_is():
    dataset = jt.Data(arrays).load()
    assert isinstance(dataset, Dataset)
    assert jt.Data(lambda: dataset).load().spec is dataset.spec


def marked(bad, **changed):
    """Examples of which one is changed."""
    return [{**item, **(changed if i == bad else {})} for i, item in enumerate(items())]


def one_pass(data):
    """Read every example that is trained on, and every held-out one."""
    dataset = data.load()
    take(dataset, 6)
    list(eval_batches(dataset.eval, 3))


def refuses_infinity(example):
    if not np.isfinite(example["x"]).all():
        raise ValueError("a bad picture")
    return example


@pytest.mark.parametrize("bad", [3, 17, 28])
@pytest.mark.parametrize(
    "load,options,what",
    [
        (lambda i: marked(i, x=np.ones(5)), {}, r"'x' has the shape|expected \(5,\), as in"),
        (lambda i: marked(i, x="a"), {}, "dtype <U1"),
        (lambda i: marked(i, x=np.inf), {"transform": refuses_infinity}, "a bad picture"),
        (
            lambda i: {**arrays(), "x": np.where(np.arange(COUNT) == i, np.inf, 0.0)},
            {"transform": refuses_infinity},
            "a bad picture",
        ),
        (lambda i: marked(i, label=7), {"classes": 3}, "'label' is 7; expected 0 to 2"),
        (lambda i: marked(i, label=-1), {}, "'label' is -1; expected integers from 0"),
    ],
    ids=["shape", "string", "transform", "arrays", "label", "negative"],
)
def test_a_bad_example_is_named_by_its_index_before_the_split(load, options, what, bad):
    made = load(bad)
    if isinstance(made, list) and "label" in made[bad]:
        made = [{"label": 0, **item} for item in made]
    with pytest.raises(DataError, match=what) as error:
        one_pass(jt.Data(lambda: made, **options))
    assert f"example {bad}" in str(error.value)


def test_negative_labels_in_memory_are_refused_without_classes():
    labels = np.where(np.arange(COUNT) == 3, -1, 1)
    with pytest.raises(DataError, match="1 labels are out of range, the first -1; expected integ"):
        jt.Data({**arrays(), "label": labels}).load()
    assert jt.Data({**arrays(), "target": labels}).load()


def test_labels_of_a_stream_are_checked_against_classes():
    def batches():
        for last in (2, 3):
            yield {"label": np.array([0, 1, 2, last])}

    dataset = jt.Data(lambda: (batches, [{"label": 0}]), classes=3).load()
    with pytest.raises(DataError, match="batch 1: 'label' is 3; expected 0 to 2, for classes is 3"):
        take(dataset, 2)


class Augment:
    def __call__(self, example, *, rng):
        return with_noise(example, rng)


def with_noise(example, rng=None):
    return {**example, "own": np.float32(0.0 if rng is None else rng.normal())}


@pytest.mark.parametrize("transform", [with_noise, Augment()], ids=["default", "keyword"])
@pytest.mark.parametrize("kind", ["transform", "batch_transform"])
def test_an_argument_named_rng_is_given_and_left_out_of_evaluation(transform, kind):
    dataset = loaded("list", **{kind: transform})
    drawn = [batch["own"] for batch in take(dataset, 3)]
    assert len(set(np.ravel(drawn).tolist())) > 1
    for a, b in zip(drawn, take(dataset, 3), strict=True):
        np.testing.assert_array_equal(a, b["own"])
    assert "own" not in next(eval_batches(dataset.eval, 3))


class Source:
    def __init__(self, n: int = 10):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return {"x": np.float32(index)}


def test_a_class_makes_the_data_and_its_arguments_are_settings():
    data = jt.Data(Source, n=30)
    assert data.n == 30 and len(data.load().train) == 24


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "transform,line",
    [
        (lambda batch: 1 / 0, "^batch_transform failed: ZeroDivisionError: division by zero$"),
        (lambda batch: None, "^the batch that batch_transform returned is None; expected a dict"),
    ],
)
def test_a_batch_transform_that_fails_is_one_line(form, transform, line):
    with pytest.raises(DataError, match=line):
        loaded(form, batch_transform=transform)


def test_batches_of_one_example_have_one_shape():
    ragged = marked(17, x=np.ones(5))
    made = train_batches(jt.Data(lambda: (ragged, items())).load().train, 1, seed=0)
    for steps_per_call in (1, 5):
        iterator = iterate(made, steps_per_call)
        with pytest.raises(DataError, match=r"example 17: 'x' has the shape \(5,\); expected \(3,"):
            for _ in range(COUNT):
                next(iterator)


def short(sizes):
    def batches():
        for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
            yield {"id": np.arange(start, start + size)}

    return jt.Data(lambda: (batches, [{"id": 0}])).load()


def test_a_shorter_last_batch_is_left_out_of_its_pass():
    taken = take(short([4, 4, 2]), 5)
    assert [batch["id"][0] for batch in taken] == [0, 4, 0, 4, 0]
    made = train_batches(short([4, 4, 2]).train, BATCH, seed=0)
    for at in range(1, 5):
        first, second = iterate(made), iterate(made)
        for _ in range(at):
            next(first)
        second.set_state(first.get_state())
        assert next(first)["id"][0] == next(second)["id"][0]


@pytest.mark.parametrize(
    "sizes,line",
    [
        ([4, 2, 4], "batch 1 has 2 examples; expected 4, the batch_size, or fewer in the last"),
        ([4, 5], "batch 1 has 5 examples; expected 4"),
        ([2], "pass 0 over the data has no whole batch"),
    ],
)
def test_other_sizes_of_batches_are_refused(sizes, line):
    with pytest.raises(DataError, match=line):
        take(short(sizes), 2)


@pytest.mark.parametrize("form", ["iter dataset", "functions"])
def test_the_position_after_an_error_is_before_the_item_that_failed(form):
    bad = []

    def fails(batch):
        if bad and batch["id"][0] == bad[0]:
            raise ValueError("bad")
        return batch

    made = train_batches(loaded(form, batch_transform=fails).train, BATCH, seed=0)
    expected = iterate(made, 3)
    items_ = [next(expected) for _ in range(3)]
    first = iterate(made, 3)
    next(first)
    bad.append(items_[1]["id"][1, 0])
    with pytest.raises(DataError):
        next(first)
    bad.clear()
    state = first.get_state()
    assert state["next_batch"] == 3
    resumed = iterate(made, 3)
    resumed.set_state(state)
    for item in items_[1:]:
        np.testing.assert_array_equal(next(resumed)["id"], item["id"])


COMPLEX = np.exp(1j * np.arange(COUNT * 3.0)).reshape(COUNT, 3)


def waves():
    return [{"id": i, "x": COMPLEX[i]} for i in range(COUNT)]


@pytest.mark.parametrize(
    "made",
    [
        {"id": np.arange(COUNT), "x": COMPLEX.astype(np.complex64)},
        waves(),
        (grain.MapDataset.source(waves()).to_iter_dataset(), waves()),
        (lambda batch_size: iter([{"x": COMPLEX[:batch_size]}]), waves()),
    ],
    ids=["arrays", "list", "iter dataset", "function"],
)
def test_complex_numbers_are_refused_unless_a_transform_makes_them_real(made):
    with pytest.raises(DataError, match=r"^'x' has complex numbers, complex\d+; expected real nu"):
        jt.Data(lambda: made).load()
    parts = lambda batch: {"x": np.stack([batch["x"].real, batch["x"].imag], -1)}
    spec = jt.Data(lambda: made, batch_transform=parts).load().spec
    assert spec.example["x"].shape == (3, 2)
