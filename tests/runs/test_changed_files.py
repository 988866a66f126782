"""A run resumes only on the data that it began with: their number and the names of their classes."""

import json

import numpy as np
import pytest
from flax import linen

import jmp_train as jt
from jmp_train.errors import UsageError
from jmp_train.runs.directory import check_same_data
from jmp_train.sources.described import Described

pytestmark = pytest.mark.usefixtures("quick_runs")


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(x)


def experiment(steps, examples=20, names=("cat", "dog"), held_out=None):
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)

    def part(count):
        arrays = {"x": x[:count], "label": np.arange(count) % 2}
        return Described(arrays, lambda i: f"row {i}", names)

    return jt.Experiment(
        Net,
        jt.Data(lambda: part(examples) if held_out is None else (part(examples), part(held_out))),
        task=jt.tasks.classification(inputs="x"),
        steps=steps,
        batch_size=4,
        trackers=(),
    )


@pytest.mark.slow
def test_a_run_on_other_data_is_refused_in_one_line(tmp_path):
    run = tmp_path / "run"
    jt.train(experiment(2), run)
    assert json.loads((run / "spec.json").read_text())["class_names"] == ["cat", "dog"]
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for options, change in (
        ({"examples": 21}, "training examples 16 -> 17"),
        ({"examples": 16, "held_out": 5}, "held-out examples 4 -> 5"),
        ({"names": ("dog", "cat")}, "class 0 'cat' -> 'dog'"),
        (
            {"names": ("cat", "cow"), "examples": 25},
            "training examples 16 -> 20, held-out examples 4 -> 5, class 1 'dog' -> 'cow'",
        ),
    ):
        with pytest.raises(UsageError) as error:
            jt.train(experiment(4, **options), run)
        assert str(error.value) == (
            f"{run} holds a run on other data: {change}; expected the same data, another --run-dir, or "
            "--force to resume with these"
        )
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert jt.train(experiment(4), run)["steps"] == 4


@pytest.mark.slow
def test_force_resumes_on_other_data_which_count_from_then_on(tmp_path):
    jt.train(experiment(2), tmp_path)
    assert jt.train(experiment(4, examples=30), tmp_path, force=True)["steps"] == 4
    assert jt.train(experiment(6, examples=30), tmp_path)["steps"] == 6
    with pytest.raises(UsageError, match="training examples 24 -> 16"):
        jt.train(experiment(8), tmp_path)


@pytest.mark.slow
def test_a_directory_of_an_earlier_version_resumes(tmp_path):
    jt.train(experiment(2), tmp_path)
    spec = tmp_path / "spec.json"
    saved = json.loads(spec.read_text())
    spec.write_text(json.dumps({key: saved[key] for key in ("example", "classes")}))
    assert jt.train(experiment(4, examples=30, names=("a", "b")), tmp_path)["steps"] == 4
    assert json.loads(spec.read_text())["examples"] == {"training": 24, "held-out": 6}


@pytest.mark.parametrize(
    "text",
    [
        '{"examples": 3, "class_names": 5}',
        '{"examples": {"training": null}, "class_names": null}',
        '{"examples": {"training": 16, "held-out": 4}, "class_names": 5}',
        "{",
        "[]",
        "[" * 100_000,
    ],
)
def test_facts_that_cannot_be_read_are_written_anew(tmp_path, text):
    (tmp_path / "spec.json").write_text(text)
    assert check_same_data(tmp_path, experiment(2).data.load(), force=False) == []


def test_a_stream_has_no_number_to_compare(tmp_path):
    def batches(batch_size):
        for _ in range(3):
            yield {
                "x": np.ones((batch_size, 3), np.float32),
                "label": np.zeros(batch_size, np.int32),
            }

    rows = [{"x": np.ones(3, np.float32), "label": 1}] * 4
    own = jt.Experiment(
        Net,
        jt.Data(lambda: (batches, rows), classes=2),
        task=jt.tasks.classification(inputs="x"),
        steps=2,
        batch_size=4,
        trackers=(),
    )
    jt.train(own, tmp_path)
    saved = json.loads((tmp_path / "spec.json").read_text())
    assert saved["examples"] == {"training": None, "held-out": 4} and "class_names" not in saved
