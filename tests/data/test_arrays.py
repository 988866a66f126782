"""Arrays from a file: read as they were saved, within the memory that is free."""

import numpy as np
import pytest

from jmp_train.data import NpzConfig, arrays


@pytest.fixture
def saved(tmp_path):
    def save(name="data", **values):
        path = tmp_path / f"{name}.npz"
        np.savez_compressed(path, **values)
        return str(path)

    return save


def rows(*parts):
    """Return examples with their labels as a sorted list, to compare sets of examples."""
    return sorted(
        (tuple(map(float, np.ravel(x))), int(y))
        for part in parts
        for x, y in zip(part["image"], part["label"], strict=True)
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_every_example_comes_once_in_float32_with_its_label(saved, dtype):
    x = (np.arange(50 * 2 * 3).reshape(50, 2, 3) / 8).astype(dtype)  # exact in float16
    y = np.arange(50) % 7
    data = NpzConfig(saved(x=x, y=y), eval_share=0.3).load()
    assert (len(data.train.arrays["label"]), len(data.eval["label"])) == (35, 15)
    assert rows(data.train.arrays, data.eval) == sorted(
        (tuple(a.ravel().tolist()), int(b)) for a, b in zip(x, y, strict=True)
    )
    assert (
        data.train.arrays["image"].dtype == np.float32
        and data.train.arrays["label"].dtype == np.int32
    )
    assert data.spec.example["image"].shape == (2, 3) and data.spec.classes == 7
    assert data.train.augment is None


def test_uint8_goes_from_0_to_1(saved):
    x = np.array([[0, 51, 255]] * 10, np.uint8)
    image = NpzConfig(saved(x=x, y=np.arange(10) % 2)).load().train.arrays["image"]
    np.testing.assert_array_equal(image, np.tile(np.float32([0, 0.2, 1]), (8, 1)))


def test_the_held_out_examples_are_the_same_in_every_run(saved):
    path = saved(x=np.random.default_rng(0).normal(size=(30, 2)), y=np.arange(30) % 3)
    a, b = NpzConfig(path).load(), NpzConfig(path).load()
    for part in ("image", "label"):
        np.testing.assert_array_equal(a.eval[part], b.eval[part])


def test_a_second_file_is_held_out_in_its_order(saved):
    x, y = np.arange(40.0).reshape(20, 2), np.arange(20) % 4
    train, held_out = saved(images=x, classes=y), saved("held", images=x[:5] + 0.5, classes=y[:5])
    data = NpzConfig(train, held_out, x="images", y="classes").load()
    np.testing.assert_array_equal(data.train.arrays["image"], x)
    np.testing.assert_array_equal(data.eval["image"], x[:5] + 0.5)
    np.testing.assert_array_equal(data.eval["label"], y[:5])


def test_classes_may_be_more_than_the_labels_show_and_labels_may_be_whole_floats(saved):
    path = saved(x=np.ones((10, 1)), y=np.array([0.0, 1.0] * 5))
    assert NpzConfig(path).load().spec.classes == 2
    assert NpzConfig(path, classes=12).load().spec.classes == 12


@pytest.mark.parametrize(
    "labels,line",
    [
        (
            [1, 2],
            r"are 1, 2 \(2 different\); expected every integer from 0 to 1, .*--data.classes 3 if some classes have no examples$",
        ),
        (
            [0, 3],
            r"are 0, 3 \(2 different\); expected every integer from 0 to 1, .*--data.classes 4 if some classes have no examples$",
        ),
        (
            [0, 1, 3],
            r"are 0, 1, 3 \(3 different\); expected every integer from 0 to 2, .*--data.classes 4 if some classes have no examples$",
        ),
        (
            [0],
            r"are 0 \(1 different\); expected every integer from 0 to 1, .*--data.classes 2 if some classes have no examples$",
        ),
        (range(1, 13), r"are 1, 2, 3, 4, 5, \.\.\., 12 \(12 different\); expected .* from 0 to 11"),
        ([0.0, 2.0], r"are 0, 2 \(2 different\); expected every integer from 0 to 1"),
    ],
)
def test_labels_with_a_gap_are_refused_unless_classes_are_given(saved, labels, line):
    y = np.array([*labels] * 10)
    path = saved(x=np.ones((len(y), 1)), y=y)
    with pytest.raises(ValueError, match=line):
        NpzConfig(path).load()
    assert NpzConfig(path, classes=40).load().spec.classes == 40


def test_a_class_may_be_held_out_whole(saved):
    """The gap is looked for in the file, not in the share of it that is trained on."""
    y = np.array([0, 1] * 20 + [2])
    path = saved(x=np.ones((41, 1)), y=y)
    data = NpzConfig(path, eval_share=0.97).load()
    assert data.spec.classes == 3 and len(set(data.train.arrays["label"].tolist())) < 3


def test_an_array_that_the_memory_does_not_hold_is_refused_unread(saved, monkeypatch):
    path = saved(x=np.zeros((1000, 1000), np.float32), y=np.arange(1000) % 2)  # 4 kB as stored
    monkeypatch.setattr(arrays, "available_memory", lambda: 10 << 20)
    monkeypatch.setattr(arrays, "read_entry", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"\(1000, 1000\) and needs 0.0112 GiB .* 0.00977 GiB"):
        NpzConfig(path).load()


def test_the_memory_that_is_free_is_less_than_there_is():
    import os

    free = arrays.available_memory()
    assert free is not None and 2**20 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    )


def test_labels_of_time_differences_are_refused(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 2), np.float32), y=np.arange(4).astype("m8"))
    with pytest.raises(ValueError, match="'y' has dtype timedelta64; expected integers from 0"):
        NpzConfig(str(tmp_path / "d.npz")).load()
