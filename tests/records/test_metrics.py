"""Records: strict JSON, no torn line, no step twice."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmp_train.records.metrics import read_metrics, strict_json, write_json


def reject_constant(token):
    raise AssertionError(f"bare token {token}")


@given(st.recursive(
    st.floats() | st.integers() | st.text() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
))  # fmt: skip
def test_records_are_strict_json(value):
    text = json.dumps(strict_json(value), allow_nan=False)
    json.loads(text, parse_constant=reject_constant)


def test_arrays_become_numbers_and_lists():
    value = {"a": np.float32(1.5), "b": jnp.arange(3), "c": np.array(float("nan")), 4: (1, 2)}
    assert strict_json(value) == {"a": 1.5, "b": [0, 1, 2], "c": "nan", "4": [1, 2]}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_damage_before_the_last_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2: expected a record, got '\[2\]'"):
        read_metrics(path)
