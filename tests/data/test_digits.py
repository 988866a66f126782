"""The digits: the bundled images, with the same split in every run."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jmp_train.data import DigitsConfig


def test_training_and_held_out_images_are_the_bundled_ones_and_disjoint():
    data = DigitsConfig().load()
    assert len(data.train) + len(data.eval["image"]) == 1797
    assert len(data.eval["image"]) == round(0.2 * 1797)
    images, labels = load_digits(return_X_y=True)
    rows = lambda x, y: sorted(
        zip(map(bytes, np.asarray(x, np.float32).reshape(-1, 64)), map(int, y), strict=True)
    )
    both = rows(
        np.concatenate([data.train.arrays["image"], data.eval["image"]]) * 16,
        np.concatenate([data.train.arrays["label"], data.eval["label"]]),
    )
    assert both == rows(images, labels)


def test_the_held_out_images_never_change():
    # A digest of the labels in order: a new split would make old results incomparable.
    labels = DigitsConfig().load().eval["label"].tobytes()
    assert hashlib.sha256(labels).hexdigest()[:16] == "0e43cc8d5d214759"


def test_arrays_are_float32_from_0_to_1_and_int32():
    data = DigitsConfig().load()
    assert (
        data.train.arrays["image"].dtype == np.float32
        and data.train.arrays["label"].dtype == np.int32
    )
    assert data.train.arrays["image"].min() == 0.0 and data.train.arrays["image"].max() == 1.0
    assert data.spec.example["image"].shape == (8, 8) and data.spec.classes == 10


def test_noise_has_its_deviation_and_touches_training_images_only():
    data = DigitsConfig(noise=0.3).load()
    batch = {"image": np.zeros((500, 64), np.float32), "label": np.zeros(500, np.int32)}
    noisy = data.train.augment(batch, np.random.default_rng(0))
    # 32,000 draws: the deviation's standard error is 0.3 / sqrt(64,000) = 0.0012; five of them.
    assert abs(noisy["image"].std() - 0.3) < 0.006
    assert noisy["image"].dtype == np.float32 and noisy["label"] is batch["label"]
    assert DigitsConfig(noise=0.0).load().train.augment is None


@pytest.mark.parametrize("field,value", [("eval_share", 0.0), ("eval_share", 1.0), ("noise", -1.0)])
def test_invalid_setting_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*expected"):
        DigitsConfig(**{field: value})
