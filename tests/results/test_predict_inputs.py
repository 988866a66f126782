"""What `predict` makes of its input: transforms, casts to half precision, images."""

import json

import jax
import numpy as np
import pytest
from flax import linen
from helpers.command_line import call
from PIL import Image

import jmp_train as jt
from jmp_train.data.dataset import DataError
from jmp_train.errors import UsageError
from jmp_train.results.export import export_run
from jmp_train.results.read_inputs import read_inputs
from jmp_train.spec import DataSpec

pytestmark = pytest.mark.usefixtures("quick_runs")
RAW = 100 + 3 * np.random.default_rng(0).normal(size=(60, 6))
SIDE = (RAW[:, 0] > 100).astype(np.int32)
FILE = """
from tests.results.test_predict_inputs import normalised

EXPERIMENT = normalised()
"""


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(x)


def raw():
    return {"x": RAW, "label": SIDE}


def normalise(example):
    return {**example, "x": (example["x"] - 100) / 3}


def noise(batch, rng):
    return {**batch, "x": batch["x"] + rng.normal(size=batch["x"].shape).astype(np.float32)}


def normalised(**settings):
    return jt.Experiment(
        data=jt.Data(raw, classes=2, transform=normalise, batch_transform=noise),
        task=jt.tasks.classification(inputs="x"),
        **{"model": Net, "steps": 2, "batch_size": 8, **settings},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_runs):
    folder = tmp_path_factory.mktemp("normalised") / "run"
    jt.train(normalised(), folder, name="normalised")
    return jt.load_run(folder, experiment=normalised())


def test_transforms_of_evaluation_are_applied(run):
    dense = jax.tree.map(lambda x: np.asarray(x, np.float64), run.params["Dense_0"])
    logits = (RAW - 100) / 3 @ dense["kernel"] + dense["bias"]  # without noise
    expected = 1 / (1 + np.exp(logits[:, :1] - logits[:, 1:]))
    for batch in (raw(), {"x": RAW}, RAW):
        np.testing.assert_allclose(run.predict(batch)["probability"][:, 1:], expected, rtol=1e-4)
    done = {"x": ((RAW - 100) / 3).astype(np.float32)}
    again = run.predict(done, transform=False)["probability"]
    np.testing.assert_allclose(again[:, 1:], expected, rtol=1e-4)
    assert run.predict({"x": RAW[:0]})["class"].shape == (0,)


def test_the_command_line_applies_transforms(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "normalised.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    np.savez("raw.npz", x=RAW)
    status, _, err = call(capsys, "predict", str(run.directory), "raw.npz", "--output", "out.json")
    assert (status, err) == (0, "")
    written = [row["class"] for row in json.loads((tmp_path / "out.json").read_text())]
    assert written == run.predict(RAW)["class"].tolist()


def test_a_transform_that_fails_is_named(run):
    with pytest.raises(DataError, match="example 0 .*KeyError: 'x'; the transform of the data"):
        run.predict({"y": RAW})


def test_numbers_beyond_the_range_are_refused(run):
    with pytest.raises(DataError, match="1 numbers that overflow float32, the first 1e\\+300"):
        run.predict(np.where(np.eye(6) * [1, 0, 0, 0, 0, 0], 1e300, 1.0), transform=False)


@pytest.mark.parametrize("size", [2.5, "3", 0])
def test_a_batch_size_that_is_no_number_of_examples_is_refused(run, size):
    with pytest.raises(ValueError, match="batch_size is .*; expected a whole number of at least 1"):
        run.predict(RAW, batch_size=size)


def large():
    init = lambda key: {"w": np.full((6, 2), 1e6, np.float32)}
    return init, lambda params, x: x @ params["w"]


def test_a_policy_that_overflows_parameters_is_refused(tmp_path):
    own = normalised(steps=1, model=jt.Model(large))
    jt.train(own, tmp_path / "run")
    message = "12 numbers of 'w' overflow float16, .*1e\\+06; expected a policy with float32"
    with pytest.raises(UsageError, match=message):
        jt.load_run(tmp_path / "run", experiment=own, policy="float16")


def test_the_manifest_has_the_precision_of_the_program(run, tmp_path):
    other = jt.load_run(run.directory, experiment=normalised(), policy="mixed_bfloat16")
    _, manifest = export_run(other, "stablehlo", tmp_path)
    stored = json.loads(manifest.read_text())
    assert jt.get_policy(stored["precision"]["policy"]) == jt.get_policy("mixed_bfloat16")
    rules = jt.Rules(stored["precision"]["rules"])
    assert rules.policy_of("Dense_0") == jt.get_policy("mixed_bfloat16")
    assert stored["settings"]["policy"] == "float32"


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused(tmp_path, mode):
    pixels = np.full((4, 4), 1000, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    spec = DataSpec.of({"image": np.zeros((1, 4, 4), np.float32)}, classes=2)
    with pytest.raises(ValueError, match=rf"its mode is {mode}, .* expected a complete image of 8"):
        read_inputs(tmp_path, ("image",), spec)
