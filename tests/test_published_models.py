"""The page of published models shows what the benchmark has kept, and the benchmark what it finds."""

import importlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "published_models-cpu.json"
PAGE = ROOT / "docs" / "published-models.md"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("bench_published_models")
    for name in ("bench_published_models", "published_models", "record"):
        sys.modules.pop(name, None)


def test_the_page_shows_the_rows_that_were_kept(bench):
    rows = json.loads(KEPT.read_text())["rows"]
    page = PAGE.read_text()
    assert bench.with_table(page, rows) == page
    assert all(
        f"| {name} | {row['package']} {row['version']} |" in page for name, row in rows.items()
    )


def test_twelve_models_of_six_packages_were_tried(bench):
    rows = json.loads(KEPT.read_text())["rows"]
    assert set(rows) == set(bench.MODELS) and len(rows) >= 12
    assert len({row["package"] for row in rows.values()}) >= 6


def test_a_package_that_is_missing_makes_a_row(bench, monkeypatch):
    monkeypatch.setitem(bench.MODELS, "Nowhere", bench.MODELS["GIN"]._replace(package="no-such"))
    row = bench._row("Nowhere")
    assert row["failure"] == "not installed"
    assert bench._line("Nowhere", row) == "| Nowhere | no-such | not installed | | | | | | |\n"


def test_a_failing_precision_stays_in_its_row(bench, monkeypatch):
    def make():
        def build(policy):
            def run(params, inputs):
                if policy == "mixed_float16":
                    raise ValueError("no | float16 here")
                return (inputs @ params["w"]).astype(jnp.float32)

            return {"w": jnp.ones((2, 3))}, run

        return build, jnp.ones((4, 2))

    monkeypatch.setitem(bench.MODELS, "Half", bench.MODELS["GIN"]._replace(make=make))
    row = bench.measure("Half")
    # One product forward and one back, for the weights; neither is cast in this model.
    assert row["products"] == 2 and row["bfloat16"]["share"] == 0
    assert row["bfloat16"]["cosine"] == pytest.approx(1)
    line = bench._line("Half", {**row, "package": "no-such", "version": "1"})
    assert "float16: ValueError: no \\| float16 here" in line and line.count(" | ") == 8
