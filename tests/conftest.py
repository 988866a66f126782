"""What every test needs."""

import functools
import gc
import os

import jax
import pytest
from helpers.simulated_devices import NEED_DEVICES
from jax._src.interpreters import mlir
from jax.experimental.compilation_cache import compilation_cache

from jmp_train.reports.plots import plot_run

# Run by test_several_devices.py, each in a process that has so many devices.
collect_ignore = [
    file
    for file, count in NEED_DEVICES.items()
    if f"device_count={count}" not in os.environ.get("XLA_FLAGS", "")
]


# A session has millions of live objects, which full collections would go through again and again.
gc.set_threshold(50_000, 20, 50)


# JAX makes an MLIR context for each program that it lowers; with one for all, which MLIR allows, the
# tests take three quarters of the time. Private to JAX: where it is absent, nothing is changed.
if hasattr(mlir, "make_ir_context"):
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)


@pytest.fixture(scope="session", autouse=True)
def cache_folder_of_the_session(tmp_path_factory):
    """Nothing that a test starts leaves compiled programs in the user's own cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def quick_runs(cache_folder):
    """Runs that share what is compiled and draw no plots, but where a test asks for `plots`."""
    settings = {
        "jax_compilation_cache_dir": str(cache_folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("jmp_train.runs.summary.plot_run", lambda *_, **__: None)
                yield


@pytest.fixture
def plots(monkeypatch):
    """Runs draw their plots."""
    monkeypatch.setattr("jmp_train.runs.summary.plot_run", plot_run)
