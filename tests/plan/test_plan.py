"""The plan of an experiment on a CPU, against what its own program here says."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from helpers.small_runs import small

from jmp_train.cli.main import main
from jmp_train.config.find import find_experiment
from jmp_train.errors import UsageError
from jmp_train.plan import compiled
from jmp_train.plan import fit as fit_module
from jmp_train.plan.devices import DEVICES, Device, target_config, tpu_topology
from jmp_train.plan.plan import Plan, make_plan, remedies
from jmp_train.plan.report import report
from jmp_train.runs.build import build, first_state
from jmp_train.sharding import MeshShape

TINY = Device("tiny", "cpu", 2**30 + 10**6, 1e10, dict.fromkeys(("bfloat16", "float16", "float32"), 1e11), 1e9, "made up")  # fmt: skip


@pytest.mark.slow
def test_memory_is_that_of_the_program_that_trains():
    own = dataclasses.replace(find_experiment("mlp_fp16"), steps_per_call=1)
    plan = make_plan("mlp_fp16", own, DEVICES["cpu"])
    parts = build(own)
    state = first_state(own, parts)
    batch = {k: x[: own.batch_size] for k, x in parts.dataset.train.arrays.items()}
    memory: Any = parts.stepper.step.lower(state, batch).compile().memory_analysis()
    found = plan.found
    assert found["argument_bytes"] == pytest.approx(memory.argument_size_in_bytes, rel=0.01)
    assert found["temporary_bytes"] == pytest.approx(memory.temp_size_in_bytes, rel=0.05)
    whole = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert found["arguments"]["parameters"] == whole(state.params)
    assert found["arguments"]["optimizer"] == whole(state.opt_state)
    assert found["parameters"] == sum(x.size for x in jax.tree.leaves(state.params))
    assert plan.fits and set(found["products"]) == {"float16"}


@pytest.mark.slow
def test_the_operations_of_a_language_model_are_those_that_a_hand_counts(tmp_path):
    """Six for each weight and token but the embedding, whose product is that of the logits, and of
    attention 12 for each pair of positions, feature and layer, as XLA's computes them all."""
    own = find_experiment("gpt_bf16")
    plan = make_plan("gpt_bf16", own, DEVICES["cpu"])
    width, depth, length = 128, 4, 128
    inner = 320
    weights = depth * (width * 3 * width + width * width + width * 2 * inner + inner * width)
    weights += 256 * width
    tokens = own.batch_size * length
    # The loss computes its logits again in the backward pass.
    expected = (
        6 * weights * tokens + 2 * 256 * width * tokens + 12 * depth * width * length * tokens
    )
    assert sum(plan.found["products"].values()) == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    file = tmp_path / "plan.json"
    options = ["--device", "cpu", "--mesh", "data=2,fsdp=2", "--output", str(file)]
    assert main(["plan", "mlp_bf16", *options]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith("mlp_bf16 on 4 x cpu, mesh data=2,fsdp=2: 0.085 M parameters; fits")
    for words in ("memory per device", "products in bfloat16", "all-gather", "100.0%"):
        assert words in text
    values = json.loads(file.read_text())
    assert values["fits"] and values["mesh"] == "data=2,fsdp=2"
    assert {c["kind"] for c in values["collectives"]} >= {"all-gather", "all-reduce"}


@pytest.mark.slow
def test_what_does_not_fit_gets_the_first_change_that_does():
    own = small("gpt_bf16", batch_size=16)
    own = dataclasses.replace(own, batch_size=16)
    whole = make_plan("gpt_bf16", own, DEVICES["cpu"])
    again = make_plan("gpt_bf16", dataclasses.replace(own, model=dataclasses.replace(own.model, remat="full")), DEVICES["cpu"])  # fmt: skip
    assert again.found["peak"] < whole.found["peak"]
    limit = (again.found["peak"] + whole.found["peak"]) // 2 + 2**30
    plan = make_plan("gpt_bf16", own, dataclasses.replace(DEVICES["cpu"], memory=limit))
    assert not plan.fits and plan.change.startswith("--model.remat")
    assert f"fits with {plan.change}" in report(plan)


def fake(peak_of):
    """Stands for the compiler: the peak is a function of the settings that are tried."""

    def compile_for(name, experiment, device, count, tries):
        return [
            {"peak": peak_of(t), "products": {"bfloat16": 1e9 * t.get("batch_size", 1)}, "flops": 1e9,
             "moved_bytes": 10**6, "collectives": [], "parameters": 1}
            for t in tries
        ]  # fmt: skip

    return compile_for


def test_the_largest_batch_is_the_last_that_fits(monkeypatch):
    memory = {"none": 30_000, "dots": 20_000, "full": 9_000}
    peak_of = lambda t: 100_000 + t["batch_size"] * memory[t["model.remat"]]
    monkeypatch.setattr(fit_module, "compile_for", fake(peak_of))
    lines = []
    fits = fit_module.largest_batches("gpt_bf16", find_experiment("gpt_bf16"), TINY, lines.append)
    assert [(f.settings["model.remat"], f.batch_size) for f in fits] == [
        ("full", 64), ("dots", 32), ("none", 16)
    ]  # fmt: skip
    assert lines[0] == "mesh data=1, remat none, batch 1: 0.00 GiB, fits"
    assert sum("does not fit" in line for line in lines) == 3
    table = fit_module.fit_report(fits).splitlines()
    assert table[0].split()[:3] == ["mesh", "remat", "batch"] and table[1].split()[:3] == ["data=1", "full", "64"]  # fmt: skip


def test_what_fit_found_is_written_as_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fit_module, "compile_for", fake(lambda t: t["batch_size"] * 2**32))
    file = tmp_path / "fits.json"
    assert main(["plan", "gpt_bf16", "--device", "h100", "--fit", "--output", str(file)]) == 0
    values = json.loads(file.read_text())
    assert {v["batch_size"] for v in values} == {16} and all(v["plan"]["fits"] for v in values)
    missing = tmp_path / "no" / "fits.json"
    assert main(["plan", "gpt_bf16", "--fit", "--output", str(missing)]) == 2
    assert (
        f"{missing} cannot be written: {missing.parent} does not exist" in capsys.readouterr().err
    )


def test_changes_are_tried_one_upon_the_other_the_least_costly_first():
    own = dataclasses.replace(find_experiment("gpt_bf16"), batch_size=16)
    found = [text for _, text in remedies(own, MeshShape(2, 2, 1))]
    assert found[0] == "--mesh fsdp=4"
    assert found[1] == "--mesh fsdp=4 --model.remat dots"
    assert found[2] == "--mesh fsdp=4 --model.remat full"
    assert found[3] == "--mesh fsdp=4 --model.remat full --micro-batches 2"
    assert "--optimizer.parameters remainder" in found[-1]
    changes, _ = remedies(own, MeshShape(2, 2, 1))[1]
    assert changes == {"mesh": "fsdp=4", "model.remat": "dots"}


def test_a_program_that_the_compiler_refuses_does_not_fit():
    refused = {"refused": "Used 23.5G of 15.75G hbm", "peak": 23.5 * 2**30, "parameters": 10**9,
               "flops": 1e15, "products": {"bfloat16": 1e15}, "activations": 2**34, "gradients": 2**30,
               "arguments": dict.fromkeys(("parameters", "optimizer", "average", "other state", "batch"), 1)}  # fmt: skip
    plan = Plan("gpt", DEVICES["tpu-v5e"], MeshShape(), refused)
    assert not plan.fits and plan.times == {}
    assert "does not fit: it needs 24.50 GiB of 15.75" in report(plan)


@pytest.mark.parametrize(
    "options,line",
    [
        (["--device", "h1000"], "device is 'h1000'; did you mean 'h100'?"),
        (["--device", "cpu", "--mesh", "fsdp=-1"], "mesh is 'fsdp=-1'; expected the number of devices"),
        (["--devise", "cpu"], "--device"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(capsys, options, line):
    assert main(["plan", "mlp_bf16", *options]) == 2
    error = capsys.readouterr().err
    assert line in error and len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_what_the_experiment_refuses_comes_back_as_one_line(capsys):
    assert main(["plan", "mlp_bf16", "--device", "cpu", "--mesh", "data=3"]) == 2
    error = capsys.readouterr().err
    assert (
        "batch_size is 128, and the mesh data=3" in error and len(error.strip().splitlines()) == 1
    )


def test_a_device_has_its_figures_and_its_source():
    for device in DEVICES.values():
        assert device.source and device.memory > 2**30
        assert set(device.flops) == {"bfloat16", "float16", "float32"}
    assert DEVICES["h100"].flops["bfloat16"] == 989e12
    text = target_config(DEVICES["h100"])
    assert "major: 9 minor: 0" in text and "core_count: 132" in text


def test_between_hosts_data_pass_the_network_card_of_each_device():
    """By hand: eight GPUs of 450 GB/s by NVLink, and a card of 50 GB/s for each of them."""
    gather = {"kind": "all-gather", "dtype": "bf16", "count": 1, "bytes": 1}
    on = [
        {**gather, "devices": 8, "hosts": 1, "sent": 450e9},  # 1 s
        {**gather, "devices": 16, "hosts": 2, "sent": 400e9},  # eight cards a host: 1 s
        {**gather, "devices": 16, "hosts": 16, "sent": 50e9},  # one card each: 1 s
    ]
    found = {"peak": 1, "products": {"bfloat16": 1}, "moved_bytes": 1, "parameters": 1, "flops": 1,
             "activations": 0, "gradients": 0, "temporary_bytes": 0, "collectives": on,
             "arguments": dict.fromkeys(("parameters", "optimizer", "average", "other state", "batch"), 1)}  # fmt: skip
    plan = Plan("gpt", DEVICES["h100"], MeshShape(data=2, fsdp=8), found)
    assert plan.times["links"] == pytest.approx(3.0)
    text = report(plan)
    assert "450 GB/s each way, 50 GB/s of each device between hosts" in text
    assert text.count(" on 16 hosts") == 1 and text.count(" on 2 hosts") == 1
    whole = dataclasses.replace(plan, found={**found, "collectives": on[:1]})
    assert whole.times["links"] == 1.0 and "between hosts" not in report(whole)


def test_a_program_that_cannot_be_read_has_memory_but_no_links(monkeypatch):
    """What libtpu compiles, and this jaxlib does not understand: memory is still known."""

    def unreadable():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update\nmore")

    sizes = dict.fromkeys(("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes"), 7)  # fmt: skip
    program = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes), as_text=unreadable)
    own = {"arguments": {"parameters": 5}, "activations": 3, "gradients": 2, "parameters": 9,
           "flops": 1e12, "products": {"bfloat16": 1e12}}  # fmt: skip
    lowered = SimpleNamespace(compile=lambda: program)
    monkeypatch.setattr(compiled, "lower_step", lambda *arguments: (lowered, own))
    found = compiled.plan_step(None, None, DEVICES["tpu-v5p"], 8)
    assert (found["peak"], found["moved_bytes"], found["collectives"]) == (14, 2 * (5 + 3), None)
    found["arguments"] = dict.fromkeys(("parameters", "optimizer", "average", "other state", "batch"), 1)  # fmt: skip
    plan = Plan("gpt", DEVICES["tpu-v5p"], MeshShape(fsdp=8), found)
    assert plan.fits and set(plan.times) == {"products", "memory"}
    text = report(plan)
    assert (
        "not known, for the program cannot be read: INTERNAL: RET_CHECK failure: async-update\n"
        in text
    )
    assert "\n  links" not in text and "\n  memory " in text
    with pytest.raises(jax.errors.JaxRuntimeError):
        compiled.plan_step(None, None, DEVICES["h100"], 8)


def test_a_slice_of_tpus_has_a_shape():
    assert tpu_topology(DEVICES["tpu-v5e"], 8) == "v5e:2x4"
    assert tpu_topology(DEVICES["tpu-v5p"], 8) == "v5:2x2x2"
    assert tpu_topology(DEVICES["tpu-v5p"], 4096) == "v5:16x16x16"
    with pytest.raises(ValueError, match="mesh has 3 devices, and no slice of tpu-v5e does"):
        tpu_topology(DEVICES["tpu-v5e"], 3)


def test_unknown_devices_are_refused():
    from jmp_train.plan.plan import find_device

    with pytest.raises(UsageError, match="device is 'a10'; did you mean 'a100'"):
        find_device("a10")


def test_a_product_that_xla_cannot_tile_is_left_to_cublas():
    """What XLA raised for a ViT-B of 224 pixels in float32, for an H100 that is not here."""
    asked = []

    def compile_once(text, compiler_options=None):
        asked.append(compiler_options)
        if compiler_options is None:
            raise jax.errors.JaxRuntimeError(text)
        return "compiled"

    line = "INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.474 = f32[6272,768]"
    lowered = SimpleNamespace(compile=lambda **options: compile_once(line, **options))
    assert compiled.compile_lowered(lowered) == "compiled"
    assert asked == [None, {"xla_gpu_enable_triton_gemm": False}]
    other = SimpleNamespace(compile=lambda **options: compile_once("INTERNAL: no", **options))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no"):
        compiled.compile_lowered(other)
