"""Whatever is off in the user's words and files: one line, status 2, and nothing is touched."""

import hashlib
import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jmp_train.cli.main import main

ROOT = Path(__file__).resolve().parents[2]

OWN = """\
from jmp_train.data import NpzConfig
from jmp_train.config.experiment import Experiment
from jmp_train.models import MlpConfig
from jmp_train.optim import OptimizerConfig
EXPERIMENT = Experiment(MlpConfig(hidden=()), NpzConfig("good.npz"), steps=8, batch_size=8)
"""


def own(fields):
    return OWN.replace('NpzConfig("good.npz"), steps=8, batch_size=8', fields)


EXPERIMENTS = {
    "own": OWN,
    "exits": "import sys\nEXPERIMENT = sys.exit('no reason')\n",
    "raises": "\nEXPERIMENT = {}['key']\n",
    "lines": "EXPERIMENT = None\nraise ValueError('first\\nsecond')\n",
    "wrong": "EXPERIMENT = {'steps': 3}\n",
    "long": "EXPERIMENT = list(range(9999))\n",
    "none": "EXPERIMENT: int = None\n",
    "syntax": "EXPERIMENT = = 3\n",
    "misses": "import no_such_module\nEXPERIMENT = 3\n",
    "nul": "EXPERIMENT = 3\0\n",
    "text_steps": own('NpzConfig("good.npz"), steps="ten"'),
    "float_steps": own('NpzConfig("good.npz"), steps=10.0'),
    "bool_steps": own('NpzConfig("good.npz"), steps=True'),
    "rule_text": own('NpzConfig("good.npz"), rules="**=bf16"'),
    "adamx": own('NpzConfig("good.npz"), optimizer=OptimizerConfig(name="adamx")'),
    "text_rate": own('NpzConfig("good.npz"), optimizer=OptimizerConfig(learning_rate="1e-3")'),
    "listed": own('NpzConfig("good.npz")').replace("hidden=()", "hidden=[64]"),
    "no_data": own("None"),
    "mlp_on_text": own("TextConfig(length=8)").replace("NpzConfig", "TextConfig"),
    "gpt_on_arrays": own('NpzConfig("good.npz"), batch_size=8')
    .replace("MlpConfig(hidden=())", "GptConfig(width=8, depth=1, heads=1)")
    .replace("MlpConfig", "GptConfig"),
    "no_model": own('NpzConfig("good.npz")').replace("MlpConfig(hidden=())", "3"),
    "unknown_field": own('NpzConfig("good.npz"), stesp=3'),
    "no_path": own("NpzConfig()"),
}

X = np.linspace(-1, 1, 40 * 6, dtype=np.float32).reshape(40, 2, 3)
Y = np.arange(40) % 4


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


ARRAYS = {
    "good": {"x": X, "y": Y},
    "one": {"x": X[:1], "y": Y[:1]},
    "empty": {"x": X[:0], "y": Y[:0]},
    "renamed": {"xs": X, "labels": Y},
    "flat": {"x": X[:, 0, 0], "y": Y},
    "thin": {"x": X[:, :, :0], "y": Y},
    "scalar": {"x": np.float32(3), "y": Y},
    "objects": {"x": X.astype(object), "y": Y},
    "object_labels": {"x": X, "y": Y.astype(object)},
    "words": {"x": X.astype(str), "y": Y},
    "complex": {"x": X.astype(complex), "y": Y},
    "int64": {"x": X.astype(np.int64), "y": Y},
    "dates": {"x": X, "y": Y.astype("datetime64[s]")},
    "onehot": {"x": X, "y": np.eye(4, dtype=int)[Y]},
    "longer": {"x": X, "y": Y[:-1]},
    "nan": {"x": changed(changed(X, (7, 1, 2), np.nan), (9, 0, 0), np.inf), "y": Y},
    "float64": {"x": changed(X.astype(float), (3, 0, 1), 1e300), "y": Y},
    "negative": {"x": X, "y": changed(Y, 5, -1)},
    "large": {"x": X, "y": changed(Y, 5, 4000)},
    "halves": {"x": X, "y": changed(Y.astype(float), 6, 1.5)},
    "nan_label": {"x": X, "y": changed(Y.astype(float), 6, np.nan)},
    "wider": {"x": np.concatenate([X, X], 2), "y": Y},
    "no_array": {},
}


def npy(shape, data=b"", dtype="<f4"):
    """A .npy file whose head says what it likes."""
    stream = io.BytesIO()
    head = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, head)
    return stream.getvalue() + data


def zipped(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)


def make_data(folder):
    for name, arrays in ARRAYS.items():
        np.savez(folder / f"{name}.npz", **arrays)
    good = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(good[:-30])
    (folder / "zero.npz").write_bytes(b"")
    (folder / "text.npz").write_text("x,y\n1,2\n")
    # A pickle that would make a folder, were it ever loaded.
    (folder / "pickle.npz").write_bytes(b"cos\nmkdir\n(S'pwned'\ntR.")
    flipped = bytearray(good)
    flipped[300] ^= 1  # in the numbers of x
    (folder / "flipped.npz").write_bytes(flipped)
    np.save(folder / "array.npy", X)
    labels = npy((40,), Y.astype("<i8").tobytes(), "<i8")
    zipped(folder / "bomb.npz", x=npy((10**6, 10**9)), y=labels)
    zipped(folder / "lies.npz", x=npy((40, 3)), y=labels)
    zipped(folder / "negative_shape.npz", x=npy((-40, 3)), y=labels)
    zipped(folder / "no_head.npz", x=b"nothing", y=labels)
    zipped(folder / "version.npz", x=b"\x93NUMPY\x09\x00" + npy((40, 3))[8:], y=labels)
    zipped(folder / "code.npz", x=npy((40, 3)).replace(b"False", b"exit("), y=labels)
    (folder / "folder.npz").mkdir()
    os.mkfifo(folder / "pipe.npz")


CONFIGS = {
    "not_json": "{",
    "list": "[1]",
    "nothing": "",
    "deep": '{"a":' * 100_000,
    "binary": "\udcff\udcfe",
    "unnamed": '{"steps": 3}',
    "number": '{"experiment": 3}',
    "path": '{"experiment": "../own"}',
    "unknown": '{"experiment": "linear_fp33"}',
    "typo": '{"experiment": "linear_fp32", "optimizer": {"lerning_rate": 1}}',
    "text": '{"experiment": "linear_fp32", "steps": "many"}',
    "null": '{"experiment": "linear_fp32", "steps": null}',
    "bool": '{"experiment": "linear_fp32", "seed": true}',
    "flat": '{"experiment": "linear_fp32", "optimizer": 3}',
    "nested": '{"experiment": "linear_fp32", "steps": {"a": 3}}',
    "help": '{"experiment": "linear_fp32", "policy": "--help"}',
    "help_key": '{"experiment": "linear_fp32", "--help": []}',
    "negative": '{"experiment": "linear_fp32", "steps": -3}',
    "choice": '{"experiment": "linear_fp32", "optimizer": {"name": "adamx"}}',
    "whole": '{"experiment": "linear_fp32"}',
    "other": '{"experiment": "linear_fp16"}',
}


def listing(folder):
    """Every path below a folder with the digest of what it holds."""
    digest = lambda p: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else ""
    return {str(p.relative_to(folder)): digest(p) for p in folder.rglob("*")}


def call(capsys, *words):
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code or 0
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with all that can be off, and one run that is not."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "experiments").mkdir()
    for name, text in EXPERIMENTS.items():
        (folder / "experiments" / f"{name}.py").write_text(text)
    (folder / "experiments" / "a_folder.py").mkdir()
    (folder / "experiments" / "dangling.py").symlink_to("nowhere.py")
    make_data(folder)
    for name, text in CONFIGS.items():
        (folder / "configs" / name).mkdir(parents=True)
        (folder / "configs" / name / "config.json").write_bytes(
            text.encode("utf-8", errors="surrogateescape")
        )
    (folder / "file").write_text("mine")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("mine")
    files = listing(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "dont_write_bytecode", True)
        assert main(["train", "own", "--run-dir", "done"]) == 0
    new = {path: digest for path, digest in listing(folder).items() if path not in files}
    assert listing(folder) == files | new  # what there was is as it was
    assert all(path.split("/")[0] == "done" for path in new)
    return folder


T = ["train", "linear_fp16"]

# Words, then what the line must match: what was given, and what was expected or is nearest.
CONFIG_WORDS = [
    (["--steps", "ten"], r"--steps: expected an integer, got 'ten'"),
    (["--steps", "1.5"], r"--steps: expected an integer, got '1.5'"),
    (["--steps", "1e3"], r"--steps: expected an integer, got '1e3'"),
    (["--steps", ""], r"--steps: expected an integer, got ''"),
    (["--steps"], r"--steps: expected a value"),
    (["--steps", "--seed", "3"], r"--steps: expected a value"),
    (["--steps", "3", "4"], r"Unrecognized options: 4; expected --FIELD VALUE"),
    (["--optimizer.learning-rate", "fast"], r"learning-rate: expected a number, got 'fast'"),
    (["--optimizer.max-grad-norm", "x"], r"max-grad-norm: expected a number or None, got 'x'"),
    (["--model.hidden", "wide"], r"--model.hidden: expected numbers, got 'wide'"),
    (
        ["--nonfinite", "maybe"],
        r"--nonfinite is 'maybe'; expected one of stop, skip, rollback",
    ),
    (["--ema-decay", "1"], r"ema_decay is 1.0; expected 0 < ema_decay < 1, or None"),
    (["--nonfinite", "rolback"], r"--nonfinite is 'rolback'; did you mean 'rollback'"),
    (["--matmul-precision", "higest"], r"--matmul-precision is 'higest'; did you mean 'highest'"),
    (["--optimizer.name", "adamx"], r"--optimizer.name is 'adamx'; did you mean 'adam'"),
    (["--optimizer.schedule", "cosin"], r"schedule is 'cosin'; did you mean 'cosine'"),
    (["--loss-scale.kind", "dynamc"], r"--loss-scale.kind is 'dynamc'; did you mean 'dynamic'"),
    (["--stesp", "10"], r"--stesp, 10; did you mean --steps\?"),
    (["--optimizer.lernrate", "1"], r"did you mean --optimizer.learning-rate\?"),
    (["--data.nose", "1"], r"did you mean --data.noise\?"),
    (["--model.hiden", "1"], r"did you mean --model.hidden\?"),
    (["--loss-scale.inital", "1"], r"did you mean --loss-scale.initial\?"),
    (["stray"], r"Unrecognized options: stray; expected --FIELD VALUE"),
    (["--policy", "mixed_bfloat61"], r"'mixed_bfloat61'; did you mean 'mixed_bfloat16'"),
    (["--policy", ""], r"Unknown dtype or policy ''; expected one of auto"),
    (["--policy", "c=float17"], r"'float17' in policy 'c=float17'; did you mean 'float16'"),
    (["--policy", "c="], r"Unknown dtype '' in policy 'c='; expected one of"),
    (["--policy", "comput=bf16"], r"Unknown key 'comput'.*did you mean 'compute'"),
    (["--policy", "c=bf16,c=f16"], r"Key 'c' is given twice.*expected once"),
    (["--policy", "c=bf16,o"], r"Key 'o' in policy 'c=bf16,o' has no dtype; write o=bf16"),
    (["--rules", "head"], r"rule 'head' has no policy; write it as 'pattern=policy'"),
    (["--rules", "=bf16"], r"rule pattern ''; expected a glob such as"),
    (["--rules", "head=bf61"], r"'bf61'; did you mean 'bf16'"),
    (["--rules", "re:(=bf16"], r"'re:\(' is no regular expression.*expected a glob such as"),
    (["--rules", "re:a{9999999999}=bf16"], r"is no regular expression.*expected a glob such as"),
    (["--rules", "re:" + "(" * 5000 + "=bf16"], r"is no regular expression.*expected a glob"),
    (["--rules", "layer/0=bf16"], r"'layer/0' .* matches no module; the nearest are 'layers/0'"),
]
IMPOSSIBLE = [
    (["--steps", "0"], r"steps is 0; expected at least 1"),
    (["--steps", "-5"], r"steps is -5; expected at least 1"),
    (["--steps", "99999999999"], r"steps is 99999999999; expected at most 2147483647"),
    (["--batch-size", "0"], r"^jmp-train: batch_size is 0; expected at least 1"),
    (
        ["--batch-size", "8", "--micro-batches", "16"],
        r"batch_size is 8; expected a multiple of m.*16",
    ),
    (["--micro-batches", "3"], r"batch_size is 128; expected a multiple of micro_batches \(3\)"),
    (["--micro-batches", "0"], r"micro_batches is 0; expected at least 1"),
    (
        ["--batch-size", "1439", "--data.noise", "0"],
        r"batch_size is 1439; expected --batch-size of at most 1438",
    ),
    (["--log-every", "0"], r"log_every is 0; expected at least 1"),
    (["--checkpoint-every", "-1"], r"checkpoint_every is -1; expected at least 1"),
    (["--steps-per-call", "0"], r"steps_per_call is 0; expected at least 1"),
    (["--steps-per-call", "7"], r"steps is 1000; expected a multiple of steps_per_call \(7\)"),
    (["--seed", "-1"], r"seed is -1; expected 0 to 4294967295"),
    (["--seed", "4294967296"], r"seed is 4294967296; expected 0 to 4294967295"),
    (
        ["--optimizer.warmup-steps", "1000"],
        r"warmup-steps is 1000; expected fewer than --steps \(1000\)",
    ),
    (["--optimizer.warmup-steps", "-1"], r"warmup_steps is -1; expected 0 or more"),
    (["--optimizer.learning-rate", "nan"], r"learning_rate is nan; expected a number above 0"),
    (["--optimizer.learning-rate", "inf"], r"learning_rate is inf; expected a number above 0"),
    (["--optimizer.learning-rate", "-1"], r"learning_rate is -1.0; expected a number above 0"),
    (["--optimizer.b1", "1"], r"b1 is 1.0; expected 0 <= b1 < 1"),
    (["--optimizer.b2", "nan"], r"b2 is nan; expected 0 <= b2 < 1"),
    (["--optimizer.eps", "0"], r"eps is 0.0; expected a number above 0"),
    (["--optimizer.weight-decay", "nan"], r"weight_decay is nan; expected 0 or more"),
    (["--optimizer.max-grad-norm", "nan"], r"max_grad_norm is nan; expected a number above 0"),
    (["--optimizer.parameters", "master"], r"'master'.*float32; expected narrower ones"),
    (
        ["--optimizer.parameters", "remainder", "--policy", "16-true"],
        r"expected bfloat16 parameters",
    ),
    (["--loss-scale.initial", "nan"], r"initial is nan; expected a finite number above 0"),
    (["--loss-scale.initial", "-1"], r"initial is -1.0; expected a finite number above 0"),
    (["--loss-scale.growth-factor", "inf"], r"growth_factor is inf; expected at least 1"),
    (["--loss-scale.growth-interval", "0"], r"growth_interval is 0; expected 1 to"),
    (["--loss-scale.backoff-factor", "nan"], r"backoff_factor is nan; expected 0 < it <= 1"),
    (["--loss-scale.minimum", "inf"], r"minimum is inf; expected 0 <= it < inf"),
    (["--loss-scale.maximum", "nan"], r"maximum nan is below minimum 1.0; expected at least that"),
    (["--loss-scale.hysteresis", "99999999999"], r"hysteresis is 99999999999; expected 1 to"),
    (["--data.eval-share", "nan"], r"eval_share is nan; expected 0 < eval_share < 1"),
    (["--data.noise", "inf"], r"noise is inf; expected a number of 0 or more"),
    (["--model.dropout", "1"], r"dropout is 1.0; expected 0 <= dropout < 1"),
    (["--model.hidden", "8", "0"], r"hidden is \(8, 0\); expected widths of at least 1"),
]
NAMES = [
    (["train"], r"expected the name of an experiment: jmp-train train NAME"),
    (["train", "--steps", "3"], r"expected the name of an experiment"),
    (["train", ""], r"unknown experiment ''; expected one of"),
    (["train", "linear"], r"'linear' is a family; its experiments are linear_bf16, linear_fp16"),
    (["train", "linear_fp61"], r"unknown experiment 'linear_fp61'; did you mean 'linear_fp16'"),
    (["train", "../experiments/own"], r"unknown experiment '../experiments/own'"),
    (["train", "../own"], r"unknown experiment '../own'; did you mean 'own'"),
    (["train", "/etc/passwd"], r"unknown experiment '/etc/passwd'; expected one of"),
    (["train", "own.py"], r"unknown experiment 'own.py'; did you mean 'own'"),
    (["train", "experiments.own"], r"unknown experiment 'experiments.own'; expected one of"),
    (["train", "linear\n\x1b[31mfp16"], r"unknown experiment 'linear\\n\\x1b\[31mfp16'"),
    (["train", "a_folder"], r"unknown experiment 'a_folder'"),
    (["train", "dangling"], r"unknown experiment 'dangling'"),
    (["train", "exits"], r"exits.py cannot be run: SystemExit: no reason \(line 2\)"),
    (["train", "raises"], r"raises.py cannot be run: KeyError: 'key' \(line 2\)"),
    (["train", "lines"], r"lines.py cannot be run: ValueError: first \(line 2\)"),
    (["train", "syntax"], r"syntax.py cannot be run: SyntaxError: .*line 1"),
    (["train", "misses"], r"misses.py cannot be run: ModuleNotFoundError.*'no_such_module'"),
    (["train", "nul"], r"nul.py cannot be run: (SyntaxError|ValueError)"),
    (["train", "wrong"], r"wrong.py sets EXPERIMENT to \{'steps': 3\}; expected an Experiment"),
    (["train", "long"], r"long.py sets EXPERIMENT to \[0, 1, .{,60}; expected an Experiment"),
    (["train", "none"], r"none.py sets EXPERIMENT to None; expected an Experiment"),
    (["train", "text_steps"], r"steps is 'ten'; expected an integer \(line 5\)"),
    (["train", "float_steps"], r"steps is 10.0; expected an integer"),
    (["train", "bool_steps"], r"steps is True; expected an integer"),
    (["train", "rule_text"], r"rules is '\*\*=bf16'; expected a tuple, each text"),
    (["train", "adamx"], r"name is 'adamx'; did you mean 'adam'"),
    (["train", "text_rate"], r"learning_rate is '1e-3'; expected a number"),
    (["train", "listed"], r"hidden is \[64\]; expected a tuple, each an integer"),
    (
        ["train", "mlp_on_text"],
        r"MlpConfig reads image and label, and the data TextConfig have tokens and mask; expected",
    ),
    (
        ["train", "gpt_on_arrays"],
        r"GptConfig reads tokens, and the data NpzConfig have image and label; expected data that",
    ),
    (["train", "no_data"], r"data is None; expected a configuration with a method 'load'"),
    (["train", "no_model"], r"model is 3; expected a configuration with a method 'network'"),
    (["train", "unknown_field"], r"unexpected keyword argument 'stesp'"),
    (["train", "no_path"], r"missing 1 required positional argument: 'path'"),
]
RUN_DIRS = [
    (["file"], r"file cannot be read: Not a directory"),
    (["file/run"], r"file/run cannot be written: Not a directory"),
    (["full"], r"full is not empty and holds no run; expected a new folder, or a run's"),
    ([""], r"\. is not empty and holds no run"),
    # Nothing can be made there, by root either.
    (["/proc/nowhere/run"], r"/proc/nowhere/run cannot be written: No such file"),
    (["a[b]*"], r"'a\[b\]\*' holds one of the characters \[\]\*\?; choose another"),
    (["a\nb"], r"'a\\nb' holds characters that cannot be shown; choose another"),
    (["a\udcffb"], r"'a\\udcffb' holds characters that cannot be shown; choose another"),
    (["n" * 300], r"cannot be read: File name too long"),
    ([], r"--run-dir: expected a value"),
    (["configs/other"], r"holds a run of 'linear_fp16'; expected one of 'own'"),
    (["configs/not_json"], r"configs/not_json/config.json cannot be read"),
    (["configs/deep"], r"configs/deep/config.json cannot be read"),
    (["new/run", "--data.path", "flipped.npz"], r"'x' is damaged: Bad CRC-32"),
    (["new", "--rules", "nope=bf16"], r"'nope' .* matches no module"),
    (["new", "--batch-size", "33"], r"batch_size is 33; expected --batch-size of at most 32, the"),
    (["done", "--batch-size", "4"], r"other settings: batch_size 8 -> 4; expected the same"),
    (["done", "--steps", "4"], r"done is at step 8; expected --steps of at least that"),
]
EVALS = [
    ([], r"expected the directory of a run: jmp-train eval RUN_DIR"),
    (["nowhere"], r"nowhere holds no run; expected a directory with config.json"),
    (["file"], r"file holds no run; expected a directory with config.json"),
    (["full"], r"full holds no run; expected a directory with config.json"),
    (["configs/whole"], r"configs/whole holds no checkpoint; expected the directory of a run"),
    (["configs/not_json"], r"configs/not_json/config.json cannot be read"),
    (["configs/list"], r"configs/list/config.json cannot be read"),
    (["configs/nothing"], r"configs/nothing/config.json cannot be read"),
    (["configs/deep"], r"configs/deep/config.json cannot be read"),
    (["configs/binary"], r"configs/binary/config.json cannot be read"),
    (["configs/unnamed"], r"config.json cannot be read: it names no experiment"),
    (["configs/number"], r"experiment is 3; expected the name of one"),
    (["configs/path"], r"unknown experiment '../own'; did you mean 'own'"),
    (["configs/unknown"], r"unknown experiment 'linear_fp33'; did you mean 'linear_fp3?2'"),
    (["configs/typo"], r"'optimizer.lerning_rate' is no setting; did you mean 'learning_rate'"),
    (["configs/text"], r"config.json: steps is 'many'; expected an integer"),
    (["configs/null"], r"steps is None; expected an integer"),
    (["configs/bool"], r"seed is True; expected an integer"),
    (["configs/flat"], r"optimizer is 3; expected its settings"),
    (["configs/nested"], r"'steps.a' is no setting"),
    (["configs/help"], r"Unknown dtype or policy '--help'; expected one of"),
    (["configs/help_key"], r"'--help' is no setting; expected one of"),
    (["configs/negative"], r"steps is -3; expected at least 1"),
    (["configs/choice"], r"optimizer.name is 'adamx'; did you mean 'adam'"),
    (["done", "--stesp", "3"], r"did you mean --steps\?"),
]
COMPARES = [
    ([], r"expected the name of a family"),
    ([""], r"unknown family ''; expected one of"),
    (["linaer"], r"unknown family 'linaer'; did you mean 'linear'"),
    (["linear_fp16"], r"unknown family 'linear_fp16'; did you mean 'linear'"),
    (["linear", "--precisions", "fp17"], r"has no precision 'fp17'; did you mean 'fp1?[16]"),
    (
        ["linear", "--precisions", "fp32@hihg"],
        r"unknown matmul precision 'hihg'; did you mean 'high",
    ),
    (["linear", "--precisions", ","], r"no precision in ','; expected some of bf16, fp16, fp32"),
    (["linear", "--seeds", "0"], r"^jmp-train: seeds is 0; expected at least 1"),
    (["linear", "--seeds", "x"], r"--seeds: expected an integer, got 'x'"),
    (["linear", "--batch-size", "0"], r"^jmp-train: batch_size is 0; expected at least 1"),
    (["linear", "--seed", "3"], r"compare sets --seed itself; expected no --seed"),
    (["linear", "--out", "file"], r"file/runs/fp32-seed0 cannot be written: Not a directory"),
    (
        ["linear", "--data.noise", "0", "--batch-size", "9999"],
        r"of at most 1438, the number of examples",
    ),
]
TEXT = [
    (
        ["--data.path", "configs/a.txt"],
        r"configs/a.txt does not exist; its folder holds no text file",
    ),
    (
        ["--data.path", "full/thesi.txt"],
        r"full/thesi.txt does not exist; did you mean 'thesis.txt'",
    ),
    (["--data.path", "full"], r"full is a folder; expected a text file"),
    (["--data.path", "full/thesis.txt"], r"length is 128; expected less than the 4 bytes"),
    (["--data.path", "n" * 300], r"cannot be read: File name too long"),
    (["--data.length", "1"], r"length is 1; expected at least 2"),
    (["--model.heads", "3"], r"width is 128; expected a multiple of 2 x heads \(6\)"),
    (["--model.remat", "ful"], r"--model.remat is 'ful'; did you mean 'full'"),
]
PREDICTS = [
    ([], r"expected the directory of a run: jmp-train predict RUN_DIR"),
    (["nowhere"], r"nowhere holds no run; expected a directory with config.json"),
    (["configs/typo"], r"'optimizer.lerning_rate' is no setting; did you mean 'learning_rate'"),
    (["done"], r"done holds a run on npz, whose model does not continue texts; expected"),
    (["done", "--length", "0"], r"length is 0; expected at least 1"),
    (["done", "--temperature", "nan"], r"temperature is nan; expected a number of 0 or more"),
    (["done", "--prompt", ""], r"prompt is empty; expected at least one byte"),
    (["done", "--promt", "x"], r"did you mean --prompt\?"),
]
OTHERS = [
    ([""], r"unknown command ''; expected one of compare, eval, list, predict, profile, train"),
    (["trian"], r"unknown command 'trian'; did you mean 'train'"),
    (["list", "--x"], r"unexpected '--x'; jmp-train list takes no argument"),
]
FILES = [
    (["goood.npz"], r"goood.npz does not exist; did you mean 'good.npz'"),
    (["nowhere/x.npz"], r"nowhere/x.npz does not exist; its folder does not exist either"),
    (["full/x.npz"], r"full/x.npz does not exist; its folder holds no .npz file"),
    (["zzzzzzzzzz"], r"zzzzzzzzzz does not exist; its folder holds \d+ .npz files"),
    (["n" * 300], r"cannot be read: File name too long"),
    ([""], r"path is ''; expected the name of a .npz file"),
    (["folder.npz"], r"folder.npz is a folder; expected a .npz file"),
    (["pipe.npz"], r"pipe.npz is not a regular file; expected a .npz file"),
    (["text.npz"], r"text.npz is no .npz file; expected one, as numpy.savez writes"),
    (["pickle.npz"], r"pickle.npz is no .npz file; expected one"),
    (["zero.npz"], r"zero.npz is empty; expected a .npz file"),
    (["cut.npz"], r"cut.npz is cut short or damaged; expected a whole .npz file"),
    (["array.npy"], r"array.npy is a .npy file of one array; expected a .npz file"),
    (["flipped.npz"], r"flipped.npz: 'x' is damaged: Bad CRC-32.*; expected a whole file"),
    (["bomb.npz"], r"bomb.npz: 'x' is damaged: its shape \(1000000, 1000000000\) of float32 is 40+ b"),
    (["lies.npz"], r"'x' is damaged: its shape \(40, 3\) of float32 is 480 bytes, and it holds 0"),
    (["negative_shape.npz"], r"'x' is damaged: its shape is \(-40, 3\); expected a whole file"),
    (["no_head.npz"], r"no_head.npz: 'x' is damaged: .*expected a whole file"),
    (["version.npz"], r"'x' is damaged: it is of .npy version \(9, 0\), expected 1.0 or 2.0"),
    (["code.npz"], r"code.npz: 'x' is damaged: "),
    (["objects.npz"], r"'x' holds Python objects.*; expected numbers"),
    (["object_labels.npz"], r"'y' holds Python objects.*; expected numbers"),
    (["renamed.npz"], r"renamed.npz has no array 'x'; did you mean 'xs'"),
    (["renamed.npz", "--data.x", "xs"], r"has no array 'y'; expected one of xs, labels"),
    (["no_array.npz"], r"no_array.npz has no array 'x'; it holds no array"),
    (["flat.npz"], r"'x' has the shape \(40,\); expected \(examples, ...\)"),
    (["thin.npz"], r"'x' has the shape \(40, 2, 0\); expected .* at least one number"),
    (["scalar.npz"], r"'x' has the shape \(\); expected \(examples, ...\)"),
    (["words.npz"], r"'x' is of <U\d+; expected floating numbers or uint8"),
    (["complex.npz"], r"'x' is of complex128; expected floating numbers or uint8"),
    (["int64.npz"], r"'x' is of int64; expected floating numbers or uint8"),
    (["dates.npz"], r"'y' is of datetime64\[s\]; expected integers from 0"),
    (["onehot.npz"], r"'y' has the shape \(40, 4\); expected \(examples,\), one integer each"),
    (["longer.npz"], r"'x' has 40 examples and 'y' 39; expected as many"),
    (["nan.npz"], r"2 of the 240 numbers of 'x' are not finite.*the first at \[7, 1, 2\]; expected"),
    (["float64.npz"], r"1 of the 240 .* not finite in float32, the first at \[3, 0, 1\]; expected"),
    (["negative.npz"], r"1 of the 40 labels 'y' are off, the first -1 at \[5\]; expected integers from"),
    (["large.npz"], r"the labels 'y' are 0, 1, 2, 3, 4000 \(5 different\); expected every integer"),
    (["large.npz", "--data.classes", "9"], r"the first 4000 at \[5\]; expected integers from 0 to 8"),
    (["halves.npz"], r"the first 1.5 at \[6\]; expected integers from 0$"),
    (["nan_label.npz"], r"the first nan at \[6\]; expected integers from 0$"),
    (["empty.npz"], r"empty.npz holds no example; expected at least two"),
    (["one.npz", "--data.classes", "4"], r"eval_share 0.2 of 1 examples is 0; expected at least one held out"),
    (["good.npz", "--data.eval-share", "0.01"], r"eval_share 0.01 of 40 examples is 0; expected"),
    (["good.npz", "--data.eval-share", "0.99"], r"eval_share 0.99 of 40 examples is 40; expected"),
    (["good.npz", "--data.eval-share", "1"], r"eval_share is 1.0; expected 0 < eval_share < 1"),
    (["good.npz", "--data.classes", "1"], r"classes is 1; expected at least 2, or None"),
    (["good.npz", "--data.classes", "x"], r"--data.classes: expected an integer or None, got 'x'"),
    (["good.npz", "--data.x", ""], r"x is ''; expected the name of an array in the file"),
    (["good.npz", "--batch-size", "33"], r"batch_size is 33; expected --batch-size of at most 32, the"),
    (["good.npz", "--data.eval-path", "wider.npz"], r"wider.npz: an example has 12 numbers; expected 6"),
    (["good.npz", "--data.eval-path", "gone.npz"], r"gone.npz does not exist; did you mean 'o?ne|good"),
    (["good.npz", "--data.eval-path", "large.npz"], r"large.npz: .*4000 at \[5\]; expected .* 0 to 3"),
]  # fmt: skip

CASES = [
    *((T + words, line) for words, line in CONFIG_WORDS + IMPOSSIBLE),
    *NAMES,
    *((["train", "own", "--run-dir", *words], line) for words, line in RUN_DIRS),
    *((["eval", *words], line) for words, line in EVALS),
    *((["compare", *words], line) for words, line in COMPARES),
    *((["train", "gpt_fp32", *words], line) for words, line in TEXT),
    *((["predict", *words], line) for words, line in PREDICTS),
    *OTHERS,
    *((["train", "own", "--data.path", *words], line) for words, line in FILES),
]


def check(status, out, err, line):
    assert status == 2, (status, err)
    assert err.startswith("jmp-train: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert err[:-1].isprintable() and "Traceback" not in out + err
    assert re.search(line, err), err


@pytest.mark.parametrize("words,line", CASES, ids=[" ".join(words)[:60] for words, _ in CASES])
def test_what_is_off_gets_one_line_and_status_2_and_changes_nothing(
    world, capsys, monkeypatch, words, line
):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # experiments/ is the user's
    before = listing(world)
    check(*call(capsys, *words), line)
    assert listing(world) == before


def test_a_process_of_its_own_says_the_same(world):
    before = listing(world)
    done = subprocess.run(
        [sys.executable, "-m", "jmp_train", "train", "own", "--data.path", "flipped.npz"],
        cwd=world,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    check(done.returncode, done.stdout, done.stderr, "'x' is damaged: Bad CRC-32")
    assert listing(world) == before
