"""Comparing precisions: the table's numbers are those of the runs."""

import dataclasses
import io
import json
import statistics

import pytest
from rich.console import Console

from jmp_train.runs.compare import compare, markdown_table, variants_of
from jmp_train.runs.loop import Diverged


def shortened(variants):
    return {
        label: dataclasses.replace(
            e, steps=20, eval_every=20, optimizer=dataclasses.replace(e.optimizer, warmup_steps=5)
        )
        for label, e in variants.items()
    }


@pytest.mark.slow
def test_the_comparison_holds_what_the_runs_say(tmp_path):
    out = io.StringIO()
    variants = shortened(variants_of("mlp", "fp32,fp16"))
    result = compare("mlp", variants, seeds=2, out=tmp_path, console=Console(file=out, width=120))
    assert json.loads((tmp_path / "compare.json").read_text()) == result
    for label in variants:
        runs = [
            json.loads((tmp_path / "runs" / f"{label}-seed{seed}" / "summary.json").read_text())
            for seed in (0, 1)
        ]
        row = result["rows"][label]
        assert [run["seed"] for run in runs] == [0, 1]
        assert row["accuracy"]["values"] == [run["eval"]["accuracy"] for run in runs]
        assert row["accuracy"]["mean"] == statistics.fmean(row["accuracy"]["values"])
        assert row["accuracy"]["std"] == statistics.stdev(row["accuracy"]["values"])
        assert row["speed_up"] == pytest.approx(
            result["rows"]["fp32"]["seconds"]["mean"] / row["seconds"]["mean"]
        )
    assert result["rows"]["fp16"]["loss_scale"] == [65536.0, 65536.0]
    table = (tmp_path / "compare.md").read_text()
    assert table.startswith("| precision | time (s) | speed-up | accuracy |")
    assert "| fp16 |" in table and "65536" in out.getvalue()
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_runs_that_diverge_are_counted_and_the_others_compared(tmp_path):
    variants = shortened(variants_of("mlp", "fp32,pure_fp16"))
    console = Console(file=io.StringIO(), width=120)
    result = compare("mlp", variants, seeds=1, out=tmp_path, console=console)
    fp32, pure = result["rows"].values()
    assert (fp32["diverged_seeds"], pure["diverged_seeds"]) == ([], [0])
    assert pure["speed_up"] is None and pure["accuracy"]["values"] == []
    assert "| diverged (1 of 1) |" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").exists()
    with pytest.raises(Diverged, match="every run of mlp diverged"):
        compare(
            "mlp",
            {"pure_fp16": variants["pure_fp16"]},
            seeds=1,
            out=tmp_path / "all",
            console=console,
        )
    written = json.loads((tmp_path / "all" / "compare.json").read_text())
    assert written["rows"]["pure_fp16"]["diverged_seeds"] == [0]
    assert written["device"] == result["device"] and written["versions"] == result["versions"]
    assert "| diverged (1 of 1) |" in (tmp_path / "all" / "compare.md").read_text()
    assert (tmp_path / "all" / "compare.png").exists()


def test_a_row_names_how_many_of_its_seeds_diverged():
    values = {"mean": 0.9, "std": 0.0, "values": [0.9]}
    row = {"seconds": values, "accuracy": values, "loss_scale": [1.0], "skipped_steps": [0]}
    row |= {"speed_up": 1.0, "peak_memory_bytes": 2**20, "diverged_seeds": [1]}
    table = markdown_table({"metric": "accuracy", "seeds": 2, "rows": {"fp16": row}})
    assert "| 0.9000 ± 0.0000 (1 of 2 diverged) |" in table


def test_a_precision_may_ask_for_the_highest_matmul_precision():
    variants = variants_of("mlp", "fp32@highest, fp32,bf16")
    assert list(variants) == ["fp32@highest", "fp32", "bf16"]
    assert [e.matmul_precision for e in variants.values()] == ["highest", "default", "default"]


@pytest.mark.slow
def test_the_three_precisions_agree_within_their_spread(tmp_path):
    # Five seeds each. The held-out set has 359 images, so one accuracy has a binomial deviation of
    # sqrt(0.98 * 0.02 / 359) = 0.0074; differences of means are held to one of those.
    variants = variants_of("mlp", "fp32,fp16,bf16")
    result = compare("mlp", variants, seeds=5, out=tmp_path, console=Console(quiet=True))
    means = [row["accuracy"]["mean"] for row in result["rows"].values()]
    assert min(means) >= 0.97
    assert max(means) - min(means) < 0.0074
    for row in result["rows"].values():
        assert min(row["accuracy"]["values"]) >= 0.97
        assert row["skipped_steps"] == [0] * 5
