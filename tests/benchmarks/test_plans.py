"""The plans that the pages show: their tables, and figures against sums by hand."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
plans: Any = importlib.import_module("plans")
FOUND = json.loads(plans.FILE.read_text())["rows"]
TABLES = plans.tables(FOUND)


def parameters(width, depth, inner, vocabulary=256):
    """Weights of products, and all parameters: two kernels of attention, three of SwiGLU, norms, a table."""
    weights = depth * (4 * width**2 + 3 * width * inner)
    return weights, weights + depth * 2 * width + vocabulary * width + width


# Widths, depths, inner widths and vocabularies.
SIZES = {
    "gpt_1b3_bf16": (2048, 26, 5440),
    "gpt_7b_bf16": (4096, 32, 11008),
    "gpt_70b_bf16": (8192, 80, 28672),
    "llama3_8b_bf16": (4096, 32, 14336, 128256),
    "maxtext_32b_bf16": (8192, 32, 28672, 32000),
}


@pytest.mark.parametrize(
    "page,name", [("scale", "collectives"), ("paper", "published"), ("paper", "paper"), ("paper", "hosts")]
)  # fmt: skip
def test_a_page_has_the_table_of_its_plans(page, name):
    assert TABLES[name] in (ROOT / f"docs/{page}.md").read_text()


@pytest.mark.parametrize("row", plans.rows(), ids=lambda row: row.command)
def test_the_state_of_a_plan_is_twelve_bytes_a_parameter_in_equal_shares(row):
    plan = FOUND[row.command]
    sizes = SIZES[row.name]
    if "--model.hidden" in row.options:
        sizes = (*sizes[:2], 12288, *sizes[3:])
    _, count = parameters(*sizes)
    assert plan["parameters"] == count
    shares = dict(part.split("=") for part in row.mesh.split(",")).get("fsdp", "1")
    state = plan["arguments"]["parameters"] + plan["arguments"]["optimizer"]
    assert state == pytest.approx(12 * count / int(shares), rel=0.01)


@pytest.mark.parametrize("dtype,bytes_each", [("bfloat16", 2), ("float32", 4)])
def test_collectives_carry_each_parameter_as_often_as_the_mesh_needs(dtype, bytes_each):
    _, count = parameters(*SIZES["gpt_1b3_bf16"])
    sums = lambda mesh, kind: sum(
        c["bytes"]
        for c in FOUND[plans.COLLECTIVES[mesh, dtype].command]["collectives"]
        if c["kind"] == kind
    )
    # Gathered in bfloat16 for the forward pass, and again for the backward pass, as remat asks.
    for mesh in ("fsdp=8", "data=2,fsdp=4"):
        assert sums(mesh, "all-gather") == pytest.approx(2 * 2 * count, rel=0.002)
        assert sums(mesh, "reduce-scatter") == pytest.approx(bytes_each * count, rel=0.002)
    assert sums("data=2,fsdp=4", "all-reduce") == pytest.approx(bytes_each * count / 4, rel=0.002)
    assert sums("data=8", "all-reduce") == pytest.approx(bytes_each * count, rel=0.002)
    assert sums("data=8", "all-gather") == 0 and sums("fsdp=8", "all-reduce") < 100


@pytest.mark.parametrize(
    "row",
    [
        *plans.PAPER,
        plans.PUBLISHED["torchao"],
        *(r for k, r in plans.PUBLISHED.items() if "MaxText" in k),
    ],
    ids=lambda row: row.command,
)
def test_the_products_of_a_preset_are_those_that_a_hand_counts(row):
    """For each token and weight 2 forward and 4 backward, and 2 more where blocks are computed again, but for
    the last product of a block, which nothing needs; the loss computes its logits again. Attention goes by
    blocks of 256, is computed again in all presets, and has two products forward and five backward for each
    pair of a query and a key in its block or an earlier one."""
    width, depth, inner, vocabulary = (*SIZES[row.name], 256)[:4]
    weights, _ = parameters(width, depth, inner)
    saved = row.name in ("gpt_1b3_bf16", "llama3_8b_bf16") or "--model.remat dots" in row.options
    blocks = row.length // 256
    pairs = row.length * (blocks + 1) / (2 * blocks)
    a_token = 6 * weights + 8 * vocabulary * width + depth * 2 * width * pairs * (2 + 2 + 5)
    if not saved:
        a_token += 2 * weights - depth * 2 * width * inner
    assert sum(FOUND[row.command]["products"].values()) == pytest.approx(
        a_token * row.batch_size * row.length, rel=1e-3
    )


def test_the_figures_in_the_text_of_the_page_follow_from_plans_and_publications():
    page = " ".join((ROOT / "docs/paper.md").read_text().split())
    found = lambda key: FOUND[plans.PUBLISHED[key].command]
    weights, _ = parameters(*SIZES["maxtext_32b_bf16"])
    # As MaxText counts: 6 for each weight of the products, head included, and attention over all pairs.
    counted = 6 * (weights + 8192 * 32000) + 12 * 2048 * 8192 * 32
    by_products = 6 * weights + 8 * 32000 * 8192 + 32 * 2 * 8192 * 2048 * 9 / 16 * 9
    v5e = found("MaxText, v5e")
    bound = v5e["tokens"] / 256 / v5e["seconds"]["products"]
    torchao, step = found("torchao"), 8192 / 6150
    grouped, by_blocks = (
        found("torchao, parameters of grouped heads"),
        found("torchao, rows of 512"),
    )
    flat = FOUND[plans.PAPER[-2].command]
    rings = sum(
        c["count"] for c in flat["collectives"] if c["devices"] == 8192 and c["dtype"] == "bf16"
    )
    (crossing,) = [
        c
        for c in FOUND[plans.PAPER[6].command]["collectives"]
        if c["hosts"] == 1024 and c["dtype"] == "bf16"
    ]
    for words in (
        f"{counted / 1e9:.1f} GFLOP a token",
        f"132 TFLOP/s are {132e12 / counted:.0f} tokens a second and chip",
        f"The bound of products is {bound:.0f}, so that the published rate is {132e12 / counted / bound:.0%}".replace("%", " %"),
        f"itself is {bound * counted / 197e12:.0%}".replace("%", " %"),
        f"328 TFLOP/s are {328e12 / counted:,.0f} tokens",
        f"{by_products / 1e9:.1f} GFLOP a token: {459e12 / by_products:,.0f} tokens a second at most",
        f"in {found('MaxText, v5p, 4 rows a chip')['peak'] / 1e9:.2f} GB of",
        f"published rate is {328e12 / counted / (459e12 / by_products):.0%}".replace("%", " %"),
        f"at 6,150 a second are {step:.2f} s. Products alone take {torchao['seconds']['products']:.2f} s",
        f"{torchao['seconds']['products'] / step:.0%} of that".replace("%", " %"),
        f"the bound is {step / torchao['seconds']['products']:.1f} times faster",
        f"{torchao['peak'] / 1e9:.2f} GB planned, {grouped['peak'] / 1e9:.2f} with",
        f"47.65 published: {torchao['peak'] / 47.65e9 - 1:+.0%} and {grouped['peak'] / 47.65e9 - 1:+.0%}".replace("%", " %"),
        f'"memory", {torchao["seconds"]["memory"]:.2f} s',
        f"rows of 512 move {by_blocks['seconds']['memory']:.2f} s",
        f"{2 * 24 / 32 * 4096**2 * 32 / 1e6:.0f} M parameters",
        f"which saves {128256 * 4096 / 1e6:.0f} M",
        f"{crossing['sent'] / 1e9:.1f} GB from each GPU for `gpt_7b`, {crossing['sent'] / 50e9 * 1e3:.0f} ms",
        f"take {12 * parameters(*SIZES['gpt_70b_bf16'])[1] / 8 / 1e9:.0f} GB of each GPU",
        f"each of its {rings} gathers",
        f"those are {rings * 8191 * 5e-6:.0f} seconds",
        f"{1 - (1 - 1e-5) ** 8192:.1%} of the steps".replace("%", " %"),
        f"{54 * 24 * 2048 / 419:,.0f} hours of a host",
        f"{8192 * 4096 / 1e6:.1f} million tokens",
    ):  # fmt: skip
        assert words in page, words


def test_a_published_model_of_70b_has_fewer_heads_of_keys_and_values():
    width, depth, inner = SIZES["gpt_70b_bf16"]
    more = depth * 2 * width * (width - 8 * 128)  # 8 of 64 heads of 128
    page = (ROOT / "docs/gpt.md").read_text()
    assert f"{parameters(width, depth, inner)[1] / 1e6:,.0f} M" in page
    assert f"{more / 1e6:,.0f} M more" in page
