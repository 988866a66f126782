"""Experiments, data files and config.json files with something wrong in them, for test_bad_input.py."""

import io
import os
import zipfile

import numpy as np

OWN = """\
from jmp_train.data import NpzConfig
from jmp_train.config.experiment import Experiment
from jmp_train.optim import OptimizerConfig
from tests.helpers.models import gpt, mlp
EXPERIMENT = Experiment(mlp(hidden=()), NpzConfig("good.npz"), steps=8, batch_size=8)
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
    "listed": own('NpzConfig("good.npz"), rules=["**=bf16"]'),
    "texts": own('NpzConfig("good.npz")').replace("hidden=()", "hidden=['wide']"),
    "no_width": own('NpzConfig("good.npz"), batch_size=8').replace("hidden=()", "hidden=[0]"),
    "no_data": own("None"),
    "mlp_on_text": own("TextConfig(length=8)").replace("NpzConfig", "TextConfig"),
    "gpt_on_arrays": own('NpzConfig("good.npz"), task="language_modelling", batch_size=8').replace(
        "mlp(hidden=())", "gpt(width=8, depth=1, heads=1)"
    ),
    "gpt_classifies": own('NpzConfig("good.npz"), batch_size=8').replace(
        "mlp(hidden=())", "gpt(width=8, depth=1, heads=1)"
    ),
    "no_task": own('NpzConfig("good.npz"), task="clasification"'),
    "no_model": own('NpzConfig("good.npz")').replace("mlp(hidden=())", "3"),
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
    "true": "true",
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
