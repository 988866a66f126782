"""`export`: parameters in safetensors, and predictions as a program without the model's code."""

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.command_line import call
from helpers.marks import slow
from helpers.saved_arrays import final_arrays
from helpers.trained_runs import (
    POINTS,
    LinenNet,
    experiment,
    tiny_mlp,
    write_experiment_file,
)

import jmp_train as jt
from jmp_train.config import find_experiment
from jmp_train.data import DigitsConfig
from jmp_train.errors import UsageError
from jmp_train.results.export import export_run

pytestmark = pytest.mark.usefixtures("quick_runs")

SIZES = (1, 3, 17)

# Runs in a process of its own: the program file, then .npz files of inputs and outputs.
LOADER = """
import sys
import numpy as np
from jax import export

program = export.deserialize(open(sys.argv[1], "rb").read())
for pair in sys.argv[2:]:
    given, out = pair.split(":")
    with np.load(given) as arrays:
        result = program.call(dict(arrays))
    np.savez(out, **{name: np.asarray(x, np.float32) for name, x in result.items()})
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"jmp_train", "flax"}, loaded
"""


@pytest.fixture
def loaded(trained):
    """Returns a loaded run of a network."""

    def load(network, **settings):
        folder, own = trained(network, **settings)
        return jt.load_run(folder, "latest", experiment=own)

    return load


def call_elsewhere(tmp_path, program, batches):
    """Returns what the program computes in a fresh process, for each batch."""
    pairs = []
    for i, batch in enumerate(batches):
        np.savez(tmp_path / f"in{i}.npz", **batch)
        pairs.append(f"{tmp_path / f'in{i}.npz'}:{tmp_path / f'out{i}.npz'}")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", LOADER, str(program), *pairs]
    subprocess.run(command, check=True, cwd=tmp_path, env={**environment, "JAX_PLATFORMS": "cpu"})
    return [dict(np.load(tmp_path / f"out{i}.npz")) for i in range(len(pairs))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "network,settings",
    [
        ("linen", {}),
        ("nnx", {}),
        ("plain", {}),
        ("linen", {"policy": "mixed_bfloat16"}),
        ("nnx", {"policy": "mixed_float16", "ema_decay": 0.5}),
        ("nnx", {"rules": ("last=float32", "**=mixed_bfloat16")}),
        ("counting", {}),
    ],
    ids=str,
)
def test_a_program_predicts_as_the_run_in_a_fresh_process(loaded, tmp_path, network, settings):
    """Bitwise where the batches have the same shape. `Counting` is exported example by example, whose
    products may be summed in another order: 1e-6 of probabilities."""
    run = loaded(network, **settings)
    program, manifest = export_run(run, "stablehlo", tmp_path)
    outputs = call_elsewhere(tmp_path, program, [{"x": POINTS[:n]} for n in SIZES])
    tolerance = 1e-6 if network == "counting" else 0
    for n, out in zip(SIZES, outputs, strict=True):
        expected = run.predict(POINTS[:n], batch_size=n)
        assert out.keys() == expected.keys()
        np.testing.assert_array_equal(out["class"], expected["class"])
        difference = np.abs(out["probability"] - expected["probability"]).max()
        assert difference <= tolerance
    values = json.loads(manifest.read_text())
    assert values["inputs"] == {"x": {"shape": ["batch", 6], "dtype": "float32"}}
    assert values["outputs"]["class"] == {"shape": ["batch"], "dtype": "int32"}
    assert values["platforms"] == ["cpu", "cuda", "tpu"]


@pytest.mark.slow
def test_a_program_uses_the_stored_statistics(loaded, tmp_path):
    """The prediction of an example does not depend on the others, against float64."""
    run = loaded("linen")
    program, _ = export_run(run, "stablehlo", tmp_path)
    together, alone = call_elsewhere(tmp_path, program, [{"x": POINTS}, {"x": POINTS[:1]}])
    saved = {
        k.replace("'", ""): v.astype(np.float64)
        for k, v in final_arrays(run.directory).items()
        if "params" in k or "batch_stats" in k
    }
    array = lambda name: saved[next(k for k in saved if k.endswith(name) and "opt_state" not in k)]
    x = POINTS @ array("[Dense_0][kernel]") + array("[Dense_0][bias]")
    x = (x - array("[BatchNorm_0][mean]")) / np.sqrt(array("[BatchNorm_0][var]") + 1e-5)
    x = np.maximum(x * array("[BatchNorm_0][scale]") + array("[BatchNorm_0][bias]"), 0)
    logits = x @ array("[Dense_1][kernel]") + array("[Dense_1][bias]")
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(together["probability"], expected, atol=1e-5)
    np.testing.assert_allclose(alone["probability"], expected[:1], atol=1e-5)


@pytest.mark.slow
def test_images_and_texts_are_exported_too(tmp_path):
    digits = jt.Experiment(tiny_mlp(), DigitsConfig(), steps=2, policy="mixed_bfloat16")
    base = find_experiment("gpt_fp32")
    model = dataclasses.replace(base.model, width=16, depth=1, heads=2)
    data = dataclasses.replace(base.data, length=16)
    texts = dataclasses.replace(base, model=model, data=data, steps=2, batch_size=4)
    rng = np.random.default_rng(0)
    for name, own, x in [
        ("digits", digits, {"image": rng.random((5, 8, 8), np.float32)}),
        ("texts", texts, {"tokens": rng.integers(0, 256, (5, 17), np.uint8)}),
    ]:
        jt.train(own, tmp_path / name)
        run = jt.load_run(tmp_path / name, experiment=own)
        program, _ = export_run(run, "stablehlo", tmp_path / name / "export")
        (out,) = call_elsewhere(tmp_path, program, [x])
        for key, expected in run.predict(x, batch_size=5).items():
            np.testing.assert_allclose(out[key], expected, rtol=1e-5, atol=1e-5)  # float32 sums


@pytest.mark.parametrize("network", ["plain", slow("linen"), slow("nnx")])
def test_safetensors_are_read_back_bitwise(loaded, tmp_path, network):
    from safetensors.numpy import load_file

    run = loaded(network)
    file, manifest = export_run(run, "safetensors", tmp_path / "new" / "folder")
    values = json.loads(manifest.read_text())
    arrays = load_file(file)
    assert arrays.keys() == values["arrays"].keys()
    saved = final_arrays(run.directory)
    for name, about in values["arrays"].items():
        in_state = about["kind"] == "model_state"
        assert in_state == name.startswith("model_state.")
        keys = about["path"][1:] if in_state else about["path"]
        path = "".join(f"['{key}']" for key in keys)
        expected = saved[("['model_state']" if in_state else "['params']") + path]
        assert ".".join(about["path"]) == name and about["dtype"] == str(arrays[name].dtype)
        assert arrays[name].tobytes() == expected.tobytes()
        assert hashlib.sha256(arrays[name].tobytes()).hexdigest() == about["sha256"]
    leaves = len(jax.tree.leaves((run.params, run.model_state)))
    assert len(arrays) == leaves
    assert values["settings"]["batch_size"] == 16 and values["step"] == 12
    assert values["metrics"]["accuracy"] == run.summary["eval"]["accuracy"]
    assert values["spec"]["example"]["x"] == {"shape": [6], "dtype": "float32"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_are_cast_and_statistics_are_not(loaded, tmp_path, dtype):
    from safetensors.numpy import load_file

    run = loaded("linen")
    file, _ = export_run(run, "safetensors", tmp_path / "half.safetensors", dtype=dtype)
    assert file.name == "half.safetensors"
    arrays = load_file(file)
    wanted = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    kernel = np.asarray(run.params["Dense_0"]["kernel"])
    assert arrays["Dense_0.kernel"].tobytes() == kernel.astype(wanted).tobytes()
    statistics = arrays["model_state.batch_stats.BatchNorm_0.mean"]
    assert statistics.dtype == np.float32
    for name, x in arrays.items():
        assert x.dtype == (np.float32 if name.startswith("model_state") else wanted)


def test_a_cast_that_overflows_is_refused(loaded, tmp_path):
    run = loaded("plain")
    run = dataclasses.replace(run, params={"w": run.params["w"] + 1e5})
    with pytest.raises(UsageError, match=r"12 numbers of 'w' overflow float16, .*--dtype bfloat16"):
        export_run(run, "safetensors", tmp_path, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_names_that_collide_are_refused(loaded, tmp_path):
    run = dataclasses.replace(loaded("plain"), params={"a.b": np.ones(2), "a": {"b": np.ones(2)}})
    with pytest.raises(UsageError, match="two arrays have the name 'a.b'"):
        export_run(run, "safetensors", tmp_path)


@pytest.mark.parametrize("format", ["safetensors", "stablehlo"])
def test_a_full_disk_leaves_no_half_file(loaded, tmp_path, monkeypatch, format):
    def fsync(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jmp_train.results.outputs.os.fsync", fsync)
    with pytest.raises(UsageError, match="cannot be written: No space left on device") as error:
        export_run(loaded("plain"), format, tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("format", ["safetensors", "stablehlo"])
def test_an_output_that_cannot_be_written_is_one_line(loaded, tmp_path, format):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        export_run(loaded("plain"), format, tmp_path / "file" / "out")
    with pytest.raises(UsageError, match="no space|No space|cannot be written"):
        export_run(loaded("plain"), format, "/dev/full/out")


@pytest.fixture
def here(loaded, tmp_path, monkeypatch):
    write_experiment_file(tmp_path, "points")
    monkeypatch.chdir(tmp_path)
    jt.train(experiment(LinenNet), "runs/points/1", name="points")
    return tmp_path


@pytest.mark.parametrize("format", ["safetensors", "stablehlo"])
def test_export_writes_beside_the_run_and_not_over_a_file(capsys, here, format):
    words = ["export", "runs/points", "--format", format, "--checkpoint", "8"]
    status, out, err = call(capsys, *words)
    file = here / "runs/points/1/export" / f"model.{format}"
    assert status == 0, err
    assert out.split() == [
        str(p.relative_to(here)) for p in (file, file.with_name(file.name + ".json"))
    ]
    assert json.loads((here / out.split()[1]).read_text())["step"] == 8
    before = file.stat()
    status, _, err = call(capsys, *words)
    assert status == 2 and "exists; expected another name, or --force" in err
    assert file.stat() == before
    assert call(capsys, *words, "--force")[0] == 0


@pytest.mark.parametrize(
    "words,message",
    [
        (["runs/points", "--format", "onnx"], "--format is 'onnx'; expected one of safetensors"),
        (["runs/points", "--dtype", "int8"], "--dtype is 'int8'"),
        (["runs/points", "--format", "stablehlo", "--dtype", "bfloat16"], "expected --policy"),
        (["runs/points", "--output", "x.stablehlo"], "expected '.safetensors' as its ending"),
        (["runs/points", "--checkpoint", "5"], "no checkpoint '5'; expected best, latest"),
        (["runs/pionts"], "is not a run directory"),
        ([], "expected the directory of a run: jmp-train export RUN_DIR"),
    ],
)
def test_a_wrong_call_is_one_line(capsys, here, words, message):
    status, _, err = call(capsys, "export", *words)
    assert status == 2 and message in err.splitlines()[-1]
