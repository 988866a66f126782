"""Experiments: found by name, plain data, refused when impossible."""

import dataclasses

import pytest

from jmp_train.config.experiment import Experiment
from jmp_train.config.find import experiment_files, find_experiment
from jmp_train.config.settings import flatten
from jmp_train.data import DigitsConfig
from jmp_train.errors import UsageError
from jmp_train.loss_scales.config import LossScaleConfig
from jmp_train.loss_scales.states import DynamicLossScale, NoOpLossScale, StaticLossScale
from jmp_train.models import MlpConfig
from jmp_train.policy.policy import get_policy


def make(**fields):
    return Experiment(model=MlpConfig(), data=DigitsConfig(), **fields)


@pytest.mark.parametrize("name", experiment_files())
def test_every_experiment_is_found_and_is_hashable_data(name):
    experiment = find_experiment(name)
    assert experiment == find_experiment(name)
    hash(experiment)


@pytest.mark.parametrize("family", ["linear", "mlp", "gpt", "gpt_124m", "gpt_1b3"])
def test_a_family_differs_in_its_policy_alone(family):
    fp32, fp16, bf16 = (find_experiment(f"{family}_{p}") for p in ("fp32", "fp16", "bf16"))
    assert (fp32.policy, fp16.policy, bf16.policy) == ("float32", "mixed_float16", "mixed_bfloat16")
    assert fp32 == dataclasses.replace(fp16, policy="float32")
    assert fp32 == dataclasses.replace(bf16, policy="float32")


@pytest.mark.parametrize(
    "name,words",
    [
        ("mlp_bf17", "did you mean 'mlp_bf16'"),
        ("mlp", "'mlp' is a family; its experiments are mlp_bf16, mlp_fp16, mlp_fp32"),
        ("../../etc/passwd", "unknown experiment"),
        ("/etc/passwd", "unknown experiment"),
        ("experiments.mlp_bf16", "unknown experiment"),
        ("", "unknown experiment"),
        ("mlp_bf16.py", "did you mean 'mlp_bf16'"),
    ],
)
def test_a_name_that_is_none_is_refused_with_what_there_is(name, words):
    with pytest.raises(UsageError, match=words):
        find_experiment(name)


def folder_of(tmp_path, monkeypatch, **files):
    folder = tmp_path / "experiments"
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)


OWN = "from experiments.mlp import experiment\nEXPERIMENT = experiment('float32')\n"


def test_experiments_of_the_folder_at_hand_are_found_too(tmp_path, monkeypatch):
    folder_of(
        tmp_path, monkeypatch, own_fp32=OWN, wrong="EXPERIMENT = 3\n", mlp_fp32_wide=OWN,
        fails="EXPERIMENT = 1 / 0\n", __init__="",
    )  # fmt: skip
    assert {"own_fp32", "wrong", "fails", "mlp_fp32"} <= set(experiment_files())
    assert find_experiment("own_fp32") == find_experiment("mlp_fp32")
    assert find_experiment("mlp_fp32_wide") == find_experiment("mlp_fp32")
    with pytest.raises(UsageError, match=r"wrong.py sets EXPERIMENT to 3; expected an Experiment"):
        find_experiment("wrong")
    with pytest.raises(UsageError, match=r"fails.py cannot be run: ZeroDivisionError"):
        find_experiment("fails")


def test_a_file_that_sets_no_experiment_is_not_run(tmp_path, monkeypatch):
    folder_of(tmp_path, monkeypatch, sweep="raise SystemExit('ran')\n")
    assert "sweep" not in experiment_files()
    with pytest.raises(UsageError, match="unknown experiment 'sweep'"):
        find_experiment("sweep")


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"policy": "c=float17"}, "did you mean 'float16'"),
        ({"rules": ("head",)}, "rule 'head' has no policy"),
        ({"rules": ("**=mixed_bf16",)}, "did you mean 'mixed_bfloat16'"),
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"log_every": 0}, "log_every is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is"),
        ({"micro_batches": 0}, "micro_batches is 0; expected at least 1"),
        ({"micro_batches": 3}, r"batch_size is 128; expected a multiple of micro_batches \(3\)"),
        ({"steps_per_call": 3}, "steps is 1000; expected a multiple of steps_per_call"),
        ({"steps": 10, "steps_per_call": 10}, "log_every|eval_every"),
    ],
)
def test_impossible_values_are_refused_by_name(fields, words):
    if fields == {"steps": 10, "steps_per_call": 10}:
        fields |= {"log_every": 15}
    with pytest.raises(ValueError, match=words):
        make(**fields)


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"initial": 0.0}, "initial is 0.0"),
        ({"initial": float("inf")}, "initial is inf"),
        ({"growth_interval": 0}, "growth_interval is 0"),
        ({"growth_factor": 0.5}, "growth_factor is 0.5"),
        ({"backoff_factor": 1.5}, "backoff_factor is 1.5"),
        ({"minimum": 8.0, "maximum": 4.0}, "maximum 4.0 is below minimum 8.0"),
        ({"hysteresis": 0}, "hysteresis is 0"),
    ],
)
def test_an_impossible_loss_scale_is_refused_by_the_fields_own_name(fields, words):
    with pytest.raises(ValueError, match=words):
        LossScaleConfig(**fields)


def test_the_loss_scale_that_a_policy_needs():
    assert isinstance(LossScaleConfig().make([get_policy("mixed_float16")]), DynamicLossScale)
    assert isinstance(LossScaleConfig().make([get_policy("mixed_bfloat16")]), NoOpLossScale)
    assert isinstance(LossScaleConfig("none").make([get_policy("mixed_float16")]), NoOpLossScale)
    assert isinstance(LossScaleConfig("static").make([get_policy("float32")]), StaticLossScale)
    made = LossScaleConfig("dynamic", 2.0**10, 7, 3.0, 0.25, 2.0, 2.0**20, 4, True).make(
        [get_policy("float32")]
    )
    assert isinstance(made, DynamicLossScale)
    assert (float(made.loss_scale), made.period, made.factor) == (2.0**10, 7, 3.0)
    assert (made.backoff_factor, made.min_loss_scale, made.max_loss_scale) == (0.25, 2.0, 2.0**20)
    assert made.hysteresis == 4 and made.consecutive_hysteresis


def test_nested_values_flatten_by_dotted_path():
    assert flatten({"a": 1, "b": {"c": {"d": 2}}, "e": [1]}) == {"a": 1, "b.c.d": 2, "e": [1]}
