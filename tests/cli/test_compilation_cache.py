"""The compilation cache: where it lies, whose it is, and that it changes no number."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from jmp_train.cli.compilation_cache import cache_folder, keep_compiled


@pytest.fixture
def unset(monkeypatch):
    """As in a process that has told JAX nothing."""
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in options}
    jax.config.update("jax_compilation_cache_dir", None)
    yield monkeypatch
    for name, value in before.items():
        jax.config.update(name, value)


def test_cache_is_under_the_user_cache_folder(unset, tmp_path):
    unset.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled()
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "jmp-train" / "xla")
    assert (tmp_path / "jmp-train" / "xla").stat().st_mode & 0o777 == 0o700


def test_cache_is_under_home_without_an_absolute_xdg_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == tmp_path / ".cache" / "jmp-train" / "xla"


def test_a_cache_that_jax_was_told_of_stays(unset, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    keep_compiled()
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path)


def test_a_folder_that_cannot_be_made_is_no_error(unset, tmp_path):
    (tmp_path / "jmp-train").write_text("in the way")
    unset.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled()
    assert jax.config.values["jax_compilation_cache_dir"] is None


@pytest.mark.slow
def test_a_run_from_the_cache_is_the_same_to_the_bit(tmp_path):
    lines = []
    for name, words in (("off", ["--compilation-cache", "False"]), ("cold", []), ("warm", [])):
        run_dir = tmp_path / name
        fields = ["--steps", "40", "--log-every", "10", "--optimizer.warmup-steps", "5"]
        subprocess.run(
            [sys.executable, "-m", "jmp_train", "train", "mlp_fp16", "--run-dir", str(run_dir)]
            + fields
            + words,
            check=True,
            capture_output=True,
            cwd=pathlib.Path(__file__).parents[2],
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        )
        entries = list((tmp_path / "cache").rglob("jit_scan-*"))
        assert bool(entries) == (name != "off")
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["peak_memory_bytes"] > 0
        lines.append([{**r, "steps_per_second": 0} for r in records])
    assert lines[0] == lines[1] == lines[2]
