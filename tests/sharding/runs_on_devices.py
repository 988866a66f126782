"""Whole runs on simulated devices; test_several_devices.py runs this file in a process with eight.

The oracle is the same run on one of them.
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from helpers.saved_arrays import assert_same_arrays, final_arrays
from helpers.small_runs import small

import jmp_train as jt
from jmp_train.config.find import find_experiment
from jmp_train.errors import UsageError
from jmp_train.runs import build as build_module
from jmp_train.runs.build import abstract_state, build, first_state
from jmp_train.runs.evaluate import evaluate_run
from jmp_train.runs.signals import Stopped

pytestmark = pytest.mark.usefixtures("quick_runs")

MESHES = ["data=8", "data=2,fsdp=4", "fsdp=2,tensor=4", "data=2,fsdp=2,tensor=2"]
EIGHT = jax.devices()


def on(devices, monkeypatch):
    """Give runs so many of the devices."""
    monkeypatch.setattr(jax, "devices", lambda *_: EIGHT[:devices])
    monkeypatch.setattr(jax, "device_count", lambda *_: devices)


def curve(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return np.array([line["last_loss" if line["split"] == "train" else "loss"] for line in lines])


def experiment(name, **fields):
    fields = {"steps": 20, "log_every": 5, "eval_every": 10, "checkpoint_every": 10, **fields}
    if name.startswith(("cnn", "vit")):
        own = find_experiment(name)
        optimizer = dataclasses.replace(own.optimizer, warmup_steps=5)
        fields = {"batch_size": 16, "optimizer": optimizer, **fields}
        return dataclasses.replace(own, data=jt.Data(images()), **fields)
    if name.startswith("gpt"):
        fields = {"batch_size": 16, **fields}
        own = small(name, **fields)
        return dataclasses.replace(own, batch_size=16)
    return small(name, batch_size=64, **fields)


def images():
    rng = np.random.default_rng(0)
    return {
        "image": np.float32(rng.normal(size=(200, 16, 16, 1))),
        "label": np.int32(np.arange(200) % 10),
    }


# Losses of 2 to 6, after 20 steps of adam with dropout: roundings of 2^-24, 2^-11 and 2^-8 in products
# and sums of another order, which training multiplies.
TOLERANCES = {"fp32": 2e-4, "fp16": 2e-2, "bf16": 5e-2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, quick_runs):
    """The losses of an experiment on one device."""

    @functools.cache
    def losses(name):
        run_dir = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            on(1, patch)
            jt.train(experiment(name, micro_batches=2, ema_decay=0.9), run_dir, name=name)
        return curve(run_dir)

    return losses


@pytest.mark.parametrize(
    "name,mesh",
    [
        *(("mlp_fp16", mesh) for mesh in MESHES),
        ("mlp_fp32", "data=2,fsdp=4"),
        ("mlp_bf16", "data=2,fsdp=2,tensor=2"),
        ("gpt_fp16", "data=2,fsdp=4"),
        ("gpt_bf16", "data=2,fsdp=2,tensor=2"),
        ("cnn_bf16", "data=2,fsdp=4"),
        ("vit_fp16", "data=2,fsdp=4"),
    ],
)
def test_a_run_has_the_losses_of_one_device(tmp_path, alone, name, mesh):
    own = experiment(name, micro_batches=2, ema_decay=0.9, mesh=mesh)
    summary = jt.train(own, tmp_path, name=name)
    tolerance = TOLERANCES[name.rpartition("_")[2]]
    one, many = alone(name), curve(tmp_path)
    np.testing.assert_allclose(many, one, rtol=tolerance)
    assert len(one) >= 6 and summary["device"]["count"] == 8


@pytest.mark.parametrize("stop", ["same", "other"])
def test_a_run_resumes_bitwise_on_its_mesh_and_within_roundings_on_another(
    tmp_path, monkeypatch, stop
):
    own = experiment("mlp_fp16", mesh="data=2,fsdp=4")
    jt.train(own, tmp_path / "whole", name="mlp_fp16")
    cut = dataclasses.replace(own, on_record=lambda r, s: "stop" if r["step"] == 10 else None)
    jt.train(cut, tmp_path / "cut", name="mlp_fp16")
    again = own if stop == "same" else dataclasses.replace(own, mesh="fsdp=2,tensor=2")
    if stop == "other":
        on(4, monkeypatch)
    jt.train(again, tmp_path / "cut", name="mlp_fp16", force=True)
    if stop == "same":
        assert_same_arrays(final_arrays(tmp_path / "whole"), final_arrays(tmp_path / "cut"))
    else:
        np.testing.assert_allclose(
            curve(tmp_path / "cut")[-2:], curve(tmp_path / "whole")[-2:], rtol=TOLERANCES["fp16"]
        )


def test_a_run_of_eight_devices_is_evaluated_and_predicts_on_one(tmp_path, monkeypatch):
    own = experiment("mlp_fp32", mesh="fsdp=8")
    summary = jt.train(own, tmp_path, name="mlp_fp32")
    on(1, monkeypatch)
    metrics = evaluate_run(tmp_path, own)
    assert metrics["accuracy"] == pytest.approx(summary["eval"]["accuracy"])
    run = jt.load_run(tmp_path, experiment=own)
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(run.params))
    assert run.predict({"image": np.zeros((3, 8, 8), np.float32)})["class"].shape == (3,)


def test_batches_that_are_sent_and_rows_of_resident_arrays_give_one_run(tmp_path):
    own = experiment("mlp_fp16", mesh="data=2,fsdp=4")
    for name, resident in (("kept", True), ("sent", False)):
        fields = {"data_on_device": resident, "steps_per_call": 5}
        jt.train(dataclasses.replace(own, **fields), tmp_path / name, name="mlp_fp16")
    assert_same_arrays(final_arrays(tmp_path / "kept"), final_arrays(tmp_path / "sent"))


def test_no_part_of_the_first_state_is_whole_anywhere(monkeypatch):
    own = experiment("gpt_bf16", mesh="fsdp=8")
    parts = build(own)
    compiled = []
    jit = jax.jit

    def noted(function, **options):
        run = jit(function, **options)

        def call(*args):
            if options.get("out_shardings") is not None:
                compiled.append(run.lower(*args).compile().memory_analysis())
            return run(*args)

        return call

    monkeypatch.setattr(build_module.jax, "jit", noted)
    state = first_state(own, parts)
    like = abstract_state(own, parts)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim) and x.shape == y.shape
    split = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim > 1]
    assert all(not x.sharding.is_fully_replicated for x in split)
    whole = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert len(compiled) >= 2  # parameters, then the state around them
    assert compiled[0].output_size_in_bytes <= 1.05 * whole / 8
    for memory in compiled:  # parameters, two moments and the average at most
        assert memory.output_size_in_bytes <= 1.05 * 4 * whole / 8


def test_what_the_devices_cannot_share_is_one_line(tmp_path):
    for fields, line in (
        ({"batch_size": 60}, "batch_size is 60, and the mesh data=8 splits it over 8 devices; expected a multiple of 8, such as --batch-size 56"),
        ({"mesh": "data=3"}, "mesh is data=3, of 3 devices, and there are 8"),
        ({"placement": ("layers/0/kernel=-,tensor",), "mesh": "tensor=8", "batch_size": 64,
          "model": {"hidden": (12,)}}, "12 is not a multiple of tensor=8"),
    ):  # fmt: skip
        own = experiment("mlp_fp32")
        model = dataclasses.replace(own.model, **fields.pop("model", {}))
        own = dataclasses.replace(own, model=model, **fields)
        with pytest.raises(UsageError) as error:
            jt.train(own, tmp_path / "run", name="mlp_fp32")
        assert line in str(error.value) and not (tmp_path / "run").exists()


def test_a_signal_saves_the_shares(tmp_path, monkeypatch):
    from helpers.small_runs import signal_at

    own = experiment("mlp_fp16", mesh="fsdp=8")
    jt.train(own, tmp_path / "whole", name="mlp_fp16")
    with monkeypatch.context() as patch:
        signal_at(patch, 10)
        with pytest.raises(Stopped):
            jt.train(own, tmp_path / "cut", name="mlp_fp16")
    jt.train(own, tmp_path / "cut", name="mlp_fp16")
    assert_same_arrays(final_arrays(tmp_path / "whole"), final_arrays(tmp_path / "cut"))
