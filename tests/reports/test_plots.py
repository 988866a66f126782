"""Plots: which files come out for which records."""

from jmp_train.reports.plots import plot_comparison, plot_run


def records(scale):
    for step in (1, 2, 3):
        yield {
            "step": step,
            "split": "train",
            "loss": 1 / step,
            "accuracy": 0.5,
            "loss_scale": scale,
        }
    yield {"step": 3, "split": "eval", "loss": "nan", "accuracy": 0.4}


def test_a_constant_loss_scale_gets_no_plot(tmp_path):
    files = plot_run(list(records(1024.0)), tmp_path, title="t")
    assert [file.name for file in files] == ["loss.png", "accuracy.png"]
    *first, last = records(1024.0)
    varying = [*first, last, {**next(r for r in first if r["split"] == "train"), "loss_scale": 2.0}]
    files = plot_run(varying, tmp_path, title="t")
    assert [file.name for file in files] == ["loss.png", "accuracy.png", "loss_scale.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_a_comparison_of_one_seed_has_no_deviation(tmp_path):
    rows = {
        "fp32": {"metric": [0.9], "seconds": [2.0]},
        "bf16": {"metric": [0.8], "seconds": [1.0]},
    }
    plot_comparison(rows, tmp_path / "c.png", metric="accuracy", title="t")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
