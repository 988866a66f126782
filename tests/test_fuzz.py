"""Damaged and invented input raises only the documented errors.

Each check runs on 100 examples here, on 10,000 in `make test-all`.
"""

import contextlib
import copy
import dataclasses
import io
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jmp_train.cli.main import main
from jmp_train.config.find import find_experiment
from jmp_train.config.settings import flatten, with_settings
from jmp_train.data import NpzConfig
from jmp_train.errors import UsageError
from jmp_train.policy.policy import Policy, get_policy
from jmp_train.policy.rules import Rules
from jmp_train.records.metrics import read_metrics, strict_json
from jmp_train.records.trackers.jsonl import Jsonl
from jmp_train.runs.directory import read_config


def of_tokens(*tokens, most=12):
    """Text of the grammar's own pieces, which random letters would hardly ever hit."""
    return st.lists(st.sampled_from(tokens), max_size=most).map("".join)


POLICY_TEXT = st.one_of(
    of_tokens(
        "p", "params", "c", "compute", "o", "output", "=", "=", "=", ",", ",", " ", "bf16", "float16",
        "f32", "full", "half", "auto", "mixed_bfloat16", "16-true", "float8_e5m2", "float128", "\n",
    ),
    st.text(max_size=30),
)  # fmt: skip


def check_policy(text):
    try:
        policy = get_policy(text)
    except ValueError:
        return
    assert isinstance(policy, Policy) and get_policy(str(policy)) == policy


PATTERN = st.one_of(
    of_tokens(
        "re:", "**", "*", "?", "[", "]", "!", "[!a]", "/", "layers", "0", "(", ")", "{", "}", "9999999999",
        "|", "\\", "^", "-", "a", "(?P<a>", "(?i)", "+", ".",
    ),
    st.text(max_size=20),
)  # fmt: skip
RULES = st.lists(st.tuples(PATTERN, st.sampled_from(["=", "=", "=", ""]), POLICY_TEXT), max_size=3)


def check_rules(parts):
    try:
        rules = Rules("".join(part) for part in parts)
    except ValueError:
        return
    for path in ("", "layers/0", "a"):
        index = rules.index_of(path)
        assert index is None or rules.policy_of(path) == rules.entries[index].policy
    with contextlib.suppress(ValueError):
        rules.check(["", "layers/0"])
    assert hash(rules) == hash(Rules(rules)) and str(rules)


OPTIONS = [f"--{name.replace('_', '-')}" for name in flatten(
    dataclasses.asdict(find_experiment("linear_fp16"))
)]  # fmt: skip
# A shell cannot pass a null character; a byte that is not UTF-8 arrives as a surrogate.
WORD = st.text(st.characters(exclude_characters="\0"), max_size=8)
VALUE = st.one_of(
    st.sampled_from(
        ["3", "-1", "0", "nan", "inf", "-inf", "1e400", "None", "True", "adam", "bf16", "", "--", "-", "="]
    ),
    st.integers().map(str), st.floats().map(str), POLICY_TEXT.filter(lambda t: "\0" not in t), WORD,
)  # fmt: skip
OPTION = st.one_of(
    st.sampled_from([*OPTIONS, "--run-dir", "--out", "--seeds", "--precisions", "--help", "-h"]),
    WORD,
)
COMMAND = st.one_of(
    st.sampled_from(
        [("train", "linear_fp16")] * 6
        + [("compare", "linear")] * 2
        + [("eval", "run"), ("list",), ("train", "linear"), ("help",)]
    ),
    st.tuples(WORD, WORD),
)
WORDS = st.tuples(
    COMMAND, st.lists(st.one_of(st.tuples(OPTION, VALUE), st.tuples(VALUE)), max_size=4)
)


def check_command_line(parts):
    command, pairs = parts
    arguments = [*command, *(argument for pair in pairs for argument in pair)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as stop:
            assert {"-h", "--help"} & set(arguments) and not stop.code
            return
    if arguments[0] in ("train", "compare", "eval"):
        assert status in (0, 2), arguments
    if status == 2 and arguments[0]:
        text = err.getvalue()
        assert text.startswith("jmp-train: ") and text.count("\n") == 1, (arguments, text)
        assert text[:-1].isprintable()


def damaged(whole):
    """Bytes of a file after bit flips, cuts, and pieces put in or left out."""

    @st.composite
    def draw_damage(draw):
        data = bytearray(whole)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, max(len(data) - 1, 0)))
            kind = draw(st.sampled_from(["flip", "cut", "insert", "remove", "replace", "double"]))
            if kind == "flip" and data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            elif kind == "cut":
                del data[at:]
            elif kind == "insert":
                data[at:at] = draw(st.binary(max_size=8))
            elif kind == "remove":
                del data[at : at + draw(st.integers(1, 40))]
            elif kind == "replace":
                piece = draw(st.binary(min_size=1, max_size=8))
                data[at : at + len(piece)] = piece
            else:
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
        return bytes(data)

    return st.one_of(draw_damage(), draw_damage(), draw_damage(), st.binary(max_size=200))


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
        st.sampled_from(["nan", "inf", "-inf", "adamx", "../x", "--help", "linear_fp32"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)  # fmt: skip
CONFIG = strict_json(
    {"experiment": "linear_fp16", **dataclasses.asdict(find_experiment("linear_fp16"))}
)


@st.composite
def other_config(draw):
    """A config.json of another structure, or with other values."""
    config = copy.deepcopy(CONFIG)
    for _ in range(draw(st.integers(1, 3))):
        within = [config, *(value for value in config.values() if isinstance(value, dict))]
        group = draw(st.sampled_from(within))
        key = draw(st.one_of(st.sampled_from(sorted(group) or ["a"]), st.text(max_size=8)))
        if draw(st.booleans()):
            group[key] = draw(JSON)
        else:
            group.pop(key, None)
    return json.dumps(config).encode()


CONFIG_BYTES = st.one_of(damaged(json.dumps(CONFIG, indent=2).encode()), other_config())


def check_config(data):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(data)
        try:
            name, values = read_config(Path(folder))
            default = find_experiment(name)
        except UsageError:
            return
    try:
        experiment = with_settings(default, values)
    except ValueError:
        return
    # The experiment has the values that the settings gave.
    assert flatten(strict_json(dataclasses.asdict(experiment))) | values == flatten(
        strict_json(dataclasses.asdict(experiment))
    )


RECORDS = [
    {"step": step, "split": split, "loss": 0.5, "accuracy": "nan", "skipped_steps": 0}
    for step in (10, 20, 30)
    for split in ("train", "eval")
]
METRICS = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def check_metrics(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_bytes(data)
        tracker, config = Jsonl(), {"run": {"directory": folder, "step": 20}}
        try:
            records = read_metrics(path)
        except ValueError as error:
            assert str(path) in str(error) and ", line " in str(error)
            with pytest.raises(ValueError, match="expected a record"):
                tracker.start(config)
            assert path.read_bytes() == data  # nothing is lost
            return
        tracker.start(config)
        tracker.finish({})
        assert read_metrics(path) == [record for record in records if record["step"] <= 20]


X = np.linspace(-1, 1, 40 * 3, dtype=np.float32).reshape(40, 3)
Y = np.arange(40) % 4


def npz(save):
    stream = io.BytesIO()
    save(stream, x=X, y=Y)
    return stream.getvalue()


NPZ = st.one_of(damaged(npz(np.savez)), damaged(npz(np.savez_compressed)))


def load(data):
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        file.write(data)
        file.flush()
        try:
            return NpzConfig(file.name).load()
        except ValueError as error:
            assert file.name in str(error) and "\n" not in str(error)
            return None


WHOLE = load(npz(np.savez))


def check_npz(data):
    loaded = load(data)
    assert WHOLE is not None
    if loaded is not None:  # the damage lies where no number does, in a time stamp, say
        assert loaded.spec == WHOLE.spec
        for name in ("image", "label"):
            np.testing.assert_array_equal(loaded.train.arrays[name], WHOLE.train.arrays[name])
            np.testing.assert_array_equal(loaded.eval[name], WHOLE.eval[name])


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


NPY = st.tuples(st.one_of(st.just(npy(X)), damaged(npy(X))), damaged(npy(Y)))


def check_arrays_in_a_sound_archive(arrays):
    """The checksums are right here, so that the damage reaches NumPy's own reader."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, data in zip(("x.npy", "y.npy"), arrays, strict=True):
            file.writestr(name, data)
    loaded = load(stream.getvalue())
    if loaded is not None:
        assert np.isfinite(loaded.train.arrays["image"]).all()
        for part in (loaded.train.arrays, loaded.eval):
            assert part["image"].dtype == np.float32 and part["label"].dtype == np.int32
            assert 0 <= part["label"].min() <= part["label"].max() < loaded.spec.classes


CHECKS = {
    "policy": (POLICY_TEXT, check_policy),
    "rules": (RULES, check_rules),
    "command line": (WORDS, check_command_line),
    "config.json": (CONFIG_BYTES, check_config),
    "metrics.jsonl": (damaged(METRICS), check_metrics),
    "npz": (NPZ, check_npz),
    "npy": (NPY, check_arrays_in_a_sound_archive),
}


@pytest.mark.parametrize("count", [30, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CHECKS)
def test_nothing_but_what_is_documented_is_raised(tmp_path, monkeypatch, name, count):
    def reached(*_, **__):
        raise UsageError("nothing is trained here")

    monkeypatch.setattr("jmp_train.cli.train.train", reached)
    monkeypatch.setattr("jmp_train.cli.eval.evaluate_run", reached)
    monkeypatch.setattr("jmp_train.cli.profile.profile_experiment", reached)
    monkeypatch.setattr("jmp_train.cli.compare.compare", reached)
    monkeypatch.chdir(tmp_path)
    strategy, check = CHECKS[name]
    options = settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    options(given(strategy)(check))()
    assert not list(tmp_path.iterdir())
