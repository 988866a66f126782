"""The Python examples of each page run, in order, as a reader would paste them."""

import re
import runpy
from pathlib import Path

import pytest
from helpers.marks import slow

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# Rendered from results, or about commands and files: without Python examples.
PROSE = {"architecture.md", "benchmarks.md", "profiling.md", "published-models.md", "runs.md"}
FOUND = (path for path in (ROOT / "docs").rglob("*.md") if path.name not in PROSE)
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in FOUND)]

SLOW = {
    f"docs/{name}.md"
    for name in (
        "accumulation",
        "autocast",
        "flax",
        "gpt",
        "models",
        "results",
        "testing",
        "trackers",
        "training",
        "loss-scaling",
        "parameters",
        "skipped-steps",
    )
}

# What must hold after a page's last line.
CHECKS = {
    "docs/trackers.md": """
import jmp_train as jt
jt.train(EXPERIMENT, "run", name="page")
stopped = jt.train(stopping, "stopped", name="page")["stopped_early"]
print("stopped", stopped["by"] == "on_record" and stopped["step"] < 2000)
assert with_restarts.schedule(50) == 2e-3
""",
    "README.md": """
assert info.loss.dtype == jnp.float32 and jnp.isfinite(info.loss)
assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
""",
    "docs/training.md": """
assert info.loss.dtype == jnp.float32 and jnp.isfinite(info.loss)
assert first.params["params"]["layers_0"]["kernel"].dtype == jnp.float32
assert state.model_state["BatchNorm_0"]["mean"].dtype == jnp.float32
assert abs(state.model_state["BatchNorm_0"]["mean"]).max() > 0
assert loss.dtype == jnp.float32 and params.dtype == jnp.float32
""",
}
PRINTS = {
    "README.md": ["True 32768.0", "layers/2  Linear      p=full,c=full,o=full  layers/2"],
    "docs/autocast.md": ["dot_general"],
    "docs/data.md": ["160 40 2 (3,)", "(4, 16, 16, 3)"],
    "docs/sources.md": [
        "2 (24, 24, 3) 16",
        "2 (2,) 24",
        "3 (4,) 60 12",
        "True 16 4",
        "3 (4,) 120 int32",
        "flowers.npz has no array 'y'; expected one of x, labels",
    ],
    "docs/experiments/cnn.md": ["3.836", "0.003"],
    "docs/experiments/vit.md": [
        "1.312",
        "0.001",
        "(64 of 2048 values overflow) in square in float16 (Block/norm",
    ],
    "docs/gpt.md": ["20 True ['mask', 'segments', 'target_bytes', 'tokens']"],
    "docs/loss-scaling.md": ["False 65536.0 1", "32768.0 1 1"],
    "docs/trackers.md": ["start page 0", "train 20 ['accuracy']", "finish 20", "stopped True"],
    "docs/paper.md": [
        "117 57 9.1\n",  # as Daly's figures 3, 4 and 5 say: 117, 57 and 9.1 minutes
        "6.19 hours between failures",
        "gpt_70b 934 GB, 10 GB/s: 93.42 s, each 33.0 min, 11.9% lost",
    ],
    "docs/results.md": ["[0 1] (2, 2)", "(1, 2) (2, 32)", "[0 1 1] rings/model.stablehlo"],
    "docs/testing.md": [
        "found 9e+04 (7293 of 32768 values overflow) in mul in float16",
        "reduce_sum  bfloat16[4,512,16] -> bfloat16[4,16]  in blw->bw",
        "exp  bfloat16[4,512,1] -> bfloat16[4,512,1]  in Pool",
        "its rounding errors alone make 62.1 u",
    ],
    "docs/flax.md": ["head                      Linear", "the nearest are 'head'"],
}


@pytest.mark.parametrize("page", [slow(page) if page in SLOW else page for page in PAGES])
def test_examples_of_a_page_run(tmp_path, capsys, monkeypatch, quick_runs, page):
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    script = tmp_path / "page.py"
    script.write_text("\n".join([*blocks, CHECKS.get(page, "")]))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    # The first block of docs/testing.md is pool.py, whose lines it shows.
    shown = re.findall(r"^ {4,}(.*\bpool\.py:\d.*)$", text, re.MULTILINE)
    for words in [*PRINTS.get(page, []), *(line.replace("pool.py", str(script)) for line in shown)]:
        assert words in printed


@pytest.mark.parametrize("family", ["cnn", "vit"])
def test_a_familys_page_has_the_table_that_was_measured(family):
    table = (ROOT / f"benchmarks/results/compare_{family}-cpu.md").read_text().strip()
    assert table in (ROOT / f"docs/experiments/{family}.md").read_text()


def test_readme_is_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_links_between_pages_lead_to_files_and_headings():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                slugs = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
                assert anchor in slugs, f"{page.name}: {link}#{anchor}"


def test_every_policy_of_the_table_parses_to_its_dtypes():
    import jmp_train as jt

    page = (ROOT / "docs/policies.md").read_text()
    table = page[page.index("| string |") :].split("\n\n")[0]
    for row in table.splitlines()[2:]:
        names, param, compute, output, scale = (cell.strip() for cell in row.strip("|").split("|"))
        for name in re.findall(r"`([^`]+)`", names):
            policy = jt.get_policy(name)
            if param in ("float32", "bfloat16", "float16") and name != "auto":
                assert [str(d) for d in (policy.param_dtype, policy.compute_dtype, policy.output_dtype)] == [
                    param, compute, output,
                ]  # fmt: skip
                default = type(jt.default_loss_scale(policy)).__name__
                assert default == ("DynamicLossScale" if "dynamic" in scale else "NoOpLossScale")
