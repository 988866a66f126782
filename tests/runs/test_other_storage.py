"""A run resumed with parameters in another precision."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.command_line import call
from helpers.saved_arrays import final_arrays

import jmp_train as jt

OPTIONS = [
    "--steps-per-call",
    "1",
    "--log-every",
    "10",
    "--eval-every",
    "10",
    "--checkpoint-every",
    "10",
]


def train(capsys, run_dir, *options, steps=10):
    words = ["train", "mlp_fp32", *OPTIONS, "--steps", str(steps), "--run-dir", str(run_dir)]
    return call(capsys, *words, *options)


def parameters(arrays):
    return {k: v for k, v in arrays.items() if k.startswith(("['params']", ".params"))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options,dtype",
    [
        (("--policy", "bf16-true", "--optimizer.parameters", "remainder"), ml_dtypes.bfloat16),
        (("--policy", "bf16-true", "--optimizer.parameters", "master"), ml_dtypes.bfloat16),
        (("--policy", "16-true"), np.float16),
    ],
)
def test_a_run_goes_to_narrow_parameters_and_back(capsys, tmp_path, options, dtype):
    run_dir = tmp_path / "run"
    assert train(capsys, run_dir)[0] == 0
    before = final_arrays(run_dir)
    status, _, err = train(capsys, run_dir, *options, steps=20)
    assert status == 2 and "--force to resume" in err
    # Steps of 1e-30 leave the parameters as they were converted.
    still = ("--optimizer.learning-rate", "1e-30", "--force")
    status, out, err = train(capsys, run_dir, *options, *still, steps=20)
    assert status == 0, err
    assert f"parameters converted: float32 -> {np.dtype(dtype).name}" in out
    narrow = final_arrays(run_dir)
    assert parameters(before).keys() == parameters(narrow).keys() and parameters(before)
    for name, x in parameters(before).items():
        np.testing.assert_array_equal(
            narrow[name].astype(np.float32), x.astype(dtype).astype(np.float32), err_msg=name
        )
    status, out, err = train(capsys, run_dir, *still, steps=30)
    assert status == 0, err
    assert f"parameters converted: {np.dtype(dtype).name} -> float32" in out
    for name, x in parameters(final_arrays(run_dir)).items():
        kept = x if len(options) == 4 else x.astype(dtype).astype(np.float32)
        expected = before[name] if len(options) == 4 else before[name].astype(dtype)
        np.testing.assert_array_equal(kept, expected.astype(np.float32), err_msg=name)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["split"] == "train"] == [10, 20, 30]


@pytest.mark.slow
def test_checkpoints_of_both_precisions_are_used(capsys, tmp_path):
    run_dir = tmp_path / "run"
    assert train(capsys, run_dir)[0] == 0
    before = parameters(final_arrays(run_dir))
    options = ("--policy", "bf16-true", "--optimizer.parameters", "remainder", "--force")
    assert train(capsys, run_dir, *options, steps=20)[0] == 0
    for which, dtype in ((10, ml_dtypes.bfloat16), ("best", None), ("latest", None)):
        run = jt.load_run(run_dir, which)
        leaves = jax.tree.leaves(run.params)
        assert {str(x.dtype) for x in leaves} == {"bfloat16"}
        if dtype is not None:
            expected = sorted(
                float(x.astype(dtype).astype(np.float64).sum()) for x in before.values()
            )
            found = sorted(float(np.asarray(x).astype(np.float64).sum()) for x in leaves)
            np.testing.assert_array_equal(found, expected)


def test_another_network_is_still_refused(capsys, tmp_path):
    assert train(capsys, tmp_path / "run")[0] == 0
    options = ("--policy", "bf16-true", "--model.hidden", "32", "--force")
    status, _, err = train(capsys, tmp_path / "run", *options, steps=20)
    assert status == 2 and "does not match the state" in err
