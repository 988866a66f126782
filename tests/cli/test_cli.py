"""The command line: what it prints, and one clear line with status 2 for what is off."""

import json
import math
import os
import signal

import pytest

from jmp_train.cli.main import main
from jmp_train.cli.predict import printable

pytestmark = pytest.mark.usefixtures("quick_runs")


def run(capsys, *words):
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code or 0
    out, err = capsys.readouterr()
    return status, out, err


FEW = ("--steps", "20", "--log-every", "10", "--optimizer.warmup-steps", "5")


@pytest.mark.parametrize(
    "words,expected",
    [
        (["train", "mlp_bf17"], "unknown experiment 'mlp_bf17'; did you mean 'mlp_bf16'?"),
        (["train", "../../etc/passwd"], "unknown experiment '../../etc/passwd'"),
        (["train"], "expected the name of an experiment"),
        (["train", "mlp"], "is a family; its experiments are"),
        (["train", "mlp_bf16", "--optimizer.lernrate", "1"], "did you mean --optimizer.learning-rate?"),
        (["train", "mlp_bf16", "--policy", "c=float17"], "did you mean 'float16'?"),
        (["train", "mlp_bf16", "--policy", "mixed_bf16"], "did you mean 'mixed_bfloat16'?"),
        (["train", "mlp_bf16", "--steps", "ten"], "--steps: expected an integer, got 'ten'"),
        (["train", "mlp_bf16", "--steps", "0"], "steps is 0; expected at least 1"),
        (["train", "mlp_bf16", "--force", "--steps", "0"], "steps is 0; expected at least 1"),
        (["train", "mlp_bf16", "--compilation-cache", "False", "--steps", "0"], "steps is 0"),
        (["compare", "mlp", "--compilation-cache", "False", "--seeds", "0"], "seeds is 0"),
        (["train", "mlp_bf16", "--max-skipped-in-row", "0"], "max_skipped_in_row is 0; expected at"),
        (["train", "mlp_bf16", "--optimizer.b1", "x"], "--optimizer.b1: expected a number, got 'x'"),
        (["train", "mlp_bf16", "--optimizer.name", "adamx"], "'adamx'; did you mean 'adam'?"),
        (["train", "mlp_bf16", "--optimizer.warmup-steps", "9999"], "expected fewer than --steps"),
        (["train", "mlp_bf16", "--loss-scale.growth-factor", "0"], "growth_factor is 0"),
        (["train", "mlp_bf16", "--model.hidden", "-3"], "hidden is (-3,)"),
        (["train", "mlp_bf16", "--rules", "x"], "write it as 'pattern=policy'"),
        (["train", "mlp_bf16", "--rules", "head=bf61"], "did you mean 'bf16'"),
        (["train", "mlp_bf16", "stray"], "Unrecognized options: stray"),
        (["train", "mlp_bf16", "--run-dir"], "--run-dir"),
        (["eval"], "expected the directory of a run"),
        (["eval", "/nowhere"], "/nowhere is not a run directory"),
        (["predict"], "expected the directory of a run"),
        (["predict", "/nowhere"], "/nowhere is not a run directory"),
        (["predict", "/nowhere", "--prompt", ""], "jmp-train: prompt is empty"),
        (["predict", "/nowhere", "--length", "0"], "length is 0"),
        (["predict", "/nowhere", "--temperature", "-1"], "temperature is -1"),
        (["predict", "/nowhere", "--seed", "-1"], "seed is -1"),
        (["predict", "/nowhere", "--promt", "x"], "did you mean --prompt?"),
        (["train", "gpt_fp32", "--data.path", "/nowhere"], "/nowhere does not exist; "),
        (["train", "gpt_fp32", "--model.width", "12"], "expected a multiple of 2 x heads (8)"),
        (["compare", "mlq"], "unknown family 'mlq'; did you mean 'mlp'?"),
        (["compare", "mlp", "--precisions", "fp17"], "did you mean 'fp16'?"),
        (["compare", "mlp", "--precisions", "fp32@higest"], "did you mean 'highest'?"),
        (["compare", "mlp", "--precisions", ","], "no precision in ','"),
        (["compare", "mlp", "--seeds", "0"], "seeds is 0"),
        (["compare", "mlp", "--stesp", "3"], "did you mean --steps?"),
        (["compare", "mlp", "--seed", "3"], "compare sets --seed itself"),
        (["compare", "mlp", "--policy", "bf16"], "compare sets --policy itself"),
        (["list", "x"], "unexpected 'x'"),
        (["trian", "mlp_bf16"], "unknown command 'trian'; did you mean 'train'?"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_status_2(capsys, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *words)
    assert status == 2
    assert expected in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_train_then_eval_and_the_default_run_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "train", "linear_bf16", *FEW)
    assert status == 0
    assert "step 10/20" in out and "linear_bf16: accuracy" in out
    (run_dir,) = (tmp_path / "runs" / "linear_bf16").iterdir()
    assert out.splitlines()[-1] == str(run_dir.relative_to(tmp_path))
    summary = json.loads((run_dir / "summary.json").read_text())
    config = json.loads((run_dir / "config.json").read_text())
    assert config["steps"] == 20 and config["optimizer"]["warmup_steps"] == 5
    status, out, _ = run(capsys, "eval", str(run_dir))
    assert status == 0
    assert out.startswith("step 20  ") and f"accuracy {summary['eval']['accuracy']:.4f}" in out
    status, _, err = run(capsys, "predict", str(run_dir))
    assert status == 2 and err.count("\n") == 1
    assert (
        "does not continue texts; expected INPUT: a .npz or .npy file, or a folder, with image"
        in err
    )


@pytest.mark.slow
def test_a_language_model_trains_evaluates_and_continues_a_prompt(capsys, tmp_path):
    run_dir, text = str(tmp_path / "run"), tmp_path / "text"
    text.write_bytes("naïve café ".encode() * 400)
    small = ("--model.width", "16", "--model.depth", "2", "--model.heads", "2", "--batch-size", "4")
    words = (*FEW, *small, "--data.length", "16", "--data.path", str(text), "--run-dir", run_dir)
    status, out, err = run(capsys, "train", "gpt_fp16", *words)
    assert status == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval"]["bits_per_byte"] == pytest.approx(summary["eval"]["loss"] / math.log(2))
    bits = summary["data"]["bits_per_byte_of_compressors"]
    assert f"lzma on the same text: {bits['lzma']['alone']:.4f}, or " in out
    assert summary["eval"]["bits_per_byte"] < 8 and summary["loss_scale"] == 65536
    status, out, _ = run(capsys, "eval", run_dir)
    assert status == 0 and f"bits per byte {summary['eval']['bits_per_byte']:.4f}" in out
    status, out, _ = run(capsys, "predict", run_dir, "--prompt", "na\udcff\x1b", "--length", "30")
    assert status == 0 and out.startswith("na\\xff\\x1b")
    assert not any(c < " " and c not in "\n\t" for c in out)


def test_a_config_that_was_tampered_with_is_refused(capsys, tmp_path):
    run_dir = tmp_path / "run"
    assert run(capsys, "train", "linear_bf16", *FEW, "--run-dir", str(run_dir))[0] == 0
    config = json.loads((run_dir / "config.json").read_text())
    for change in ({"steps": "many"}, {"nonsense": 1}, {"experiment": "../x"}):
        (run_dir / "config.json").write_text(json.dumps({**config, **change}))
        status, _, err = run(capsys, "eval", str(run_dir))
        assert status == 2 and err.count("\n") == 1, err


def test_a_diverging_run_has_status_3(capsys, tmp_path):
    words = ("--optimizer.name", "sgd", "--optimizer.learning-rate", "1e38")
    run_dir = ("--run-dir", str(tmp_path / "run"), "--optimizer.max-grad-norm", "None")
    status, _, err = run(capsys, "train", "mlp_fp32", *FEW, *words, *run_dir)
    assert status == 3 and err.startswith(
        "jmp-train: the loss is nan at step 10; it began with step 3\n"
    )
    assert "--nonfinite skip" in err and "layers/2/kernel" in err
    assert "Traceback" not in err
    report = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert report["operations"] is None and report["parameters"]
    assert (tmp_path / "run" / "diverged.txt").read_text() in err.removeprefix("jmp-train: ")


@pytest.mark.slow
def test_too_many_skips_have_status_3_and_a_report(capsys, tmp_path):
    small = (
        "--model.hidden",
        "8",
        "--max-skipped-in-row",
        "5",
        "--log-every",
        "5",
        "--steps",
        "40",
    )
    scale = (
        "--loss-scale.kind",
        "static",
        "--loss-scale.initial",
        "1e9",
        "--checkpoint-every",
        "40",
    )
    fields = ("--optimizer.warmup-steps", "0")
    run_dir = tmp_path / "run"
    words = ("train", "mlp_fp16", *small, *scale, *fields, "--run-dir", str(run_dir))
    status, _, err = run(capsys, *words)
    assert status == 3 and "Traceback" not in err
    assert "5 steps in a row up to step 5 were not finite and were skipped" in err
    assert "overflow of float16 (largest 65504; " in err and "(backward" in err
    assert "loss scale: 1e+09 at step 5" in err
    assert "newest checkpoint: no checkpoint" in err

    text = (run_dir / "diverged.json").read_text()
    report = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert report["step"] == 5 and report["gradients"] == [
        "layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel",
    ]  # fmt: skip
    first = report["operations"]["ops"][0]
    assert first["kind"] == "overflow" and first["backward"] and first["dtype"] == "float16"
    assert first["source"].split(":")[0].endswith("jmp_train/tasks/kinds.py")
    float32 = report["float32"]
    assert float32["finite"] and float32["format"] == "float16"
    # 1e9 times the largest gradient is above 65,504, and every share is of the same numbers.
    assert float32["largest"] * 1e9 > 65504 and float32["shares"]["overflow"] > 0
    assert float32["shares_unscaled"]["overflow"] == 0
    zeros = round(float32["shares"]["zero"] * float32["count"])
    assert sum(float32["exponents"].values()) == float32["count"] - zeros
    assert (run_dir / "plots" / "gradient_exponents.png").exists()
    record = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["nonfinite"] == report["gradients"] and record["last_skipped_step"] == 5
    assert record["nonfinite_tensors"] == 4

    # The words of the advice are ones that this command takes: a word that it does not know would be
    # refused before the folder is looked at.
    advice = [tip["words"] for tip in report["advice"]]
    assert advice == [
        "--loss-scale.kind dynamic --loss-scale.initial 65536",
        "--policy mixed_bfloat16",
        "--optimizer.learning-rate 0.0002",
    ]
    for tip in advice[:2]:
        assert "holds a run with other settings" in run(capsys, *words, *tip.split())[2]


def test_no_usable_checkpoint_has_status_4(capsys, tmp_path):
    run_dir = tmp_path / "run"
    assert run(capsys, "train", "linear_bf16", *FEW, "--run-dir", str(run_dir))[0] == 0
    for file in (run_dir / "checkpoints" / "20" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    for words in (
        ("eval", str(run_dir)),
        ("train", "linear_bf16", *FEW, "--run-dir", str(run_dir)),
    ):
        status, _, err = run(capsys, *words)
        assert status == 4 and "none of the checkpoints at steps 20" in err, err


def test_list_has_a_line_for_each_experiment(capsys):
    status, out, _ = run(capsys, "list")
    assert status == 0
    (line,) = (line.split() for line in out.splitlines() if "mlp_fp16" in line)
    assert line == ["mlp_fp16", "mixed_float16", "digits", "accuracy"]


def test_help_explains_every_field(capsys):
    usage = run(capsys, "--help")[:2]
    assert usage[0] == 0
    for words in (["help"], ["list", "--help"], ["eval", "-h"], ["compare", "--help"]):
        assert run(capsys, *words)[:2] == usage
    status, out, _ = run(capsys, "compare", "mlp", "--help")
    assert status == 0 and "--precisions" in out and "--optimizer.learning-rate" in out
    status, out, _ = run(capsys, "train", "mlp_bf16", "--help")
    assert status == 0
    for word in ("--policy", "--optimizer.learning-rate", "--loss-scale.initial", "--model.hidden",
                 "--data.noise", "--run-dir", "--steps-per-call"):  # fmt: skip
        assert word in out
    assert "Precision policy" in out


def test_no_argument_shows_the_usage_with_status_2(capsys):
    status, out, _ = run(capsys)
    assert status == 2 and out.startswith("usage: jmp-train")


def test_a_signal_ends_a_comparison_with_its_status(capsys, tmp_path, monkeypatch):
    from jmp_train.reports.progress import RunProgress

    signals = iter([signal.SIGINT])
    monkeypatch.setattr(RunProgress, "train", lambda *_: [os.kill(os.getpid(), s) for s in signals])
    status, _, err = run(
        capsys, "compare", "linear", *FEW, "--steps-per-call", "1", "--out", str(tmp_path / "out")
    )
    assert status == 130 and "stopped by SIGINT at step 11" in err
    assert err.splitlines()[1] == "resume with:" and err.count("\n") == 3


def test_list_marks_a_failing_file_and_continues(capsys, tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "bad.py").write_text("EXPERIMENT = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "list")
    assert status == 0 and "ZeroDivisionError" in out.replace("\n", "") and "mlp_fp16" in out


@pytest.mark.parametrize("turn", [*range(0x202A, 0x202F), *range(0x2066, 0x206A)], ids=hex)
def test_what_turns_the_direction_of_a_text_is_escaped(turn):
    assert printable(f"a{chr(turn)}b".encode(), "utf-8") == f"a\\u{turn:04x}b"


def test_joiners_and_scripts_are_printed_unchanged():
    text = "\u05e9\u05dc\u05d5\u05dd \u0645\u200d \U0001f468\u200d\U0001f4bb\n\t"
    assert printable(text.encode(), "utf-8") == text
