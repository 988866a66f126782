"""The questions of the GPU benchmark: what their rows run, and what is concluded from figures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmp_train
from benchmarks.gpu import jax_rows, measure, questions, table

ROOT = Path(__file__).resolve().parents[2]
TOY = table.workload("gpt_124m", toy=True)
FP16, BF16 = "gpt_124m/fp16/jmp_train", "gpt_124m/bf16/jmp_train"


def row(ms, spread=0.5, **fields):
    step = {"median": ms, "q1": ms - spread, "q3": ms + spread}
    return {"status": "ok", "step_ms": step, **fields}


def losses(row_id, steps=3):
    """The losses of the first steps of a row, at toy size."""
    trainer = questions.make(table.row(row_id), TOY, 4, True)
    source = measure.batches(TOY, 4)
    return [trainer.wait(trainer.step(trainer.put(next(source)))) for _ in range(steps)]


def test_every_question_of_the_table_has_a_verdict():
    for question in table.QUESTIONS:
        assert questions.verdict(question, {}) == "not measured yet"


def test_every_row_of_a_verdict_is_in_the_table():
    planned = {r.id for r in table.ROWS}
    for question in table.QUESTIONS:
        seen = set()
        rows = mock.MagicMock()
        rows.get.side_effect = lambda key, seen=seen: seen.add(key)
        rows.__contains__.side_effect = lambda key: False
        questions.verdict(question, rows)
        assert seen <= planned
        assert {r.id for r in table.ROWS if r.question == question} <= seen


def test_verdict_keeps_select_where_cond_is_slower():
    rows = {f"{FP16}/skip=select": row(100), f"{FP16}/skip=cond": row(103)}
    rows[f"{FP16}/skip=none"] = row(98)
    assert questions.verdict("loss_scale", rows) == (
        "cond takes 1.030 times select (103.0 against 100.0 ms); none takes 0.980 times select "
        "(98.0 against 100.0 ms); the dynamic scale costs +2.0 %; keep select."
    )


def test_verdict_uses_cond_only_beyond_the_quartiles():
    rows = {f"{FP16}/skip=select": row(100), f"{FP16}/skip=cond": row(99.5)}
    assert "keep select" in questions.verdict("loss_scale", rows)
    rows[f"{FP16}/skip=cond"] = row(95)
    said = questions.verdict("loss_scale", rows)
    assert "use cond" in said
    assert said.endswith("not measured yet: none.")


def test_verdict_says_what_naming_costs():
    rows = {f"{FP16}/naming=on": row(101, 0.1), f"{FP16}/naming=off": row(100, 0.1)}
    assert "naming costs +1.0 %, beyond the quartiles" in questions.verdict("naming", rows)


def test_verdict_on_remat_compares_memory_and_names_what_failed():
    rows = {
        f"{BF16}/remat=dots": row(100, peak_memory_bytes=20 * 2**30),
        f"{BF16}/remat=full": row(120, peak_memory_bytes=10 * 2**30),
        f"{BF16}/remat=none": {"status": "failed", "reason": "RESOURCE_EXHAUSTED: out of memory"},
    }
    assert questions.verdict("remat", rows) == (
        "full takes 1.200 times dots (120.0 against 100.0 ms) and 0.50 times its memory; "
        "none has no figures (RESOURCE_EXHAUSTED: out of memory); keep dots."
    )


def test_verdict_says_why_a_question_has_no_answer():
    rows = {f"{BF16}/attention=cudnn": {"status": "failed", "reason": "no GPU"}}
    rows[f"{BF16}/attention=xla"] = row(1)
    said = questions.verdict("attention", rows)
    assert said == "not measured yet; cudnn has no figures (no GPU)"


def test_verdict_on_attention_follows_the_figures():
    rows = {f"{BF16}/attention=cudnn": row(100), f"{BF16}/attention=xla": row(130)}
    assert "xla takes 1.300 times cudnn" in questions.verdict("attention", rows)
    assert questions.verdict("attention", rows).endswith("keep cudnn.")
    rows[f"{BF16}/attention=xla"] = row(90)
    assert questions.verdict("attention", rows).endswith("use xla.")


def test_verdict_on_accumulation_compares_with_the_whole_batch():
    rows = {
        BF16: row(100, peak_memory_bytes=40),
        f"{BF16}/accumulate=float32": row(110, peak_memory_bytes=20, loss_100=2.0),
        f"{BF16}/accumulate=bfloat16": row(105.6, peak_memory_bytes=18, loss_100=2.01),
    }
    said = questions.verdict("accumulation", rows)
    assert "float32 takes 1.100 times the whole batch at once (110.0 against 100.0 ms)" in said
    assert "and 0.50 times its memory" in said
    assert "changes the step by -4.0 %" in said
    assert "2.0100 against 2.0000 in float32; use bfloat16." in said
    rows[f"{BF16}/accumulate=bfloat16"]["loss_100"] = 9.0
    assert questions.verdict("accumulation", rows).endswith("keep float32.")


def test_verdict_sets_only_flags_that_help():
    rows = {f"{BF16}/flags={name}": row(100) for name in questions.FLAGS}
    assert questions.verdict("xla_flags", rows).endswith("set none of them.")
    rows[f"{BF16}/flags=latency_hiding"] = row(98.9, 0.1)  # less than processes differ by
    assert questions.verdict("xla_flags", rows).endswith("set none of them.")
    rows[f"{BF16}/flags=latency_hiding"] = row(90)
    rows[f"{BF16}/flags=no_triton_gemm"] = row(120)
    said = questions.verdict("xla_flags", rows)
    assert said.endswith("; set --xla_gpu_enable_latency_hiding_scheduler=true.")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["select", "cond"])
def test_skipping_row_traces_only_its_way(way):
    with (
        mock.patch("jmp_train.select_tree", wraps=jmp_train.select_tree) as select,
        mock.patch("jax.lax.cond", wraps=jax.lax.cond) as cond,
    ):
        trainer = questions.make(table.row(f"{FP16}/skip={way}"), TOY, 4, True)
        traced = select.call_count, cond.call_count
        trainer.wait(trainer.step(trainer.put(next(measure.batches(TOY, 4)))))
        assert (select.call_count, cond.call_count) == traced  # a step runs what `make` compiled
    assert (select.called, cond.called) == (way == "select", way == "cond")


@pytest.mark.slow
def test_ways_of_skipping_give_the_same_losses():
    select, cond = (losses(f"{FP16}/skip={way}") for way in ("select", "cond"))
    assert select == cond
    # Another scale rounds other gradients; the first loss comes before any of them.
    assert losses(f"{FP16}/skip=none", 1) == pytest.approx(select[:1], rel=1e-6)


@pytest.mark.slow
def test_naming_off_keeps_losses():
    assert losses(f"{FP16}/naming=on") == losses(f"{FP16}/naming=off")


@pytest.mark.slow
def test_remat_rows_agree_to_bfloat16():
    want = losses(f"{BF16}/remat=none")
    for value in ("dots", "full"):
        # The first loss has no backward pass behind it; later ones differ by bfloat16 rounding.
        np.testing.assert_allclose(losses(f"{BF16}/remat={value}"), want, rtol=2**-8)


def test_accumulation_in_bfloat16_sums_in_bfloat16():
    # 1 + 2^-9 + 2^-9 + 2^-9 is 1 in bfloat16, whose spacing at 1 is 2^-7; float32 keeps it.
    parts = jnp.array([1.0, 2.0**-9, 2.0**-9, 2.0**-9])
    loss_fn = lambda w, batch: (w * batch["x"]).mean()
    grads = lambda: jmp_train.value_and_grad(loss_fn, "float32", micro_batches=4)(
        jnp.float32(1), {"x": parts}
    )
    assert float(grads().grads) == (1 + 3 * 2.0**-9) / 4
    target = "jmp_train.step.gradients.combine"
    with mock.patch(target, questions._combine_in_bfloat16):
        result = grads()
    assert float(result.grads) == 0.25
    assert result.grads.dtype == jnp.float32
    assert float(result.loss) == (1 + 3 * 2.0**-9) / 4


@pytest.mark.slow
def test_accumulation_rows_follow_the_whole_batch():
    trainer = jax_rows.make(table.row(BF16), TOY, 4, True)
    source = measure.batches(TOY, 4)
    want = [trainer.wait(trainer.step(trainer.put(next(source)))) for _ in range(3)]
    for value in ("float32", "bfloat16"):
        np.testing.assert_allclose(losses(f"{BF16}/accumulate={value}"), want, rtol=2**-8)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_cudnn_row_without_gpu_says_what_it_needs():
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        losses(f"{BF16}/attention=cudnn")


@pytest.mark.slow
def test_attention_row_asks_for_xla():
    asked = []
    real = jax.nn.dot_product_attention

    def attention(*args, implementation, **kwargs):
        asked.append(implementation)
        return real(*args, implementation=implementation, **kwargs)

    with mock.patch("jax.nn.dot_product_attention", attention):
        losses(f"{BF16}/attention=xla", 1)
    assert set(asked) == {"xla"}


def test_flags_are_refused_once_jax_is_imported():
    with pytest.raises(RuntimeError, match="expected to set --xla_gpu_enable_triton_gemm=false"):
        losses(f"{BF16}/flags=no_triton_gemm", 1)


@pytest.mark.slow
def test_flags_are_set_before_jax_starts():
    code = """
import json, os
from benchmarks.gpu import questions, table
row = table.row("gpt_124m/bf16/jmp_train/flags=latency_hiding")
questions.make(row, table.workload("gpt_124m", True), 4, True)
print(json.dumps(os.environ["XLA_FLAGS"]))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == (
        "--xla_cpu_enable_fast_math=false --xla_gpu_enable_latency_hiding_scheduler=true"
    )


def test_verdict_imports_neither_jax_nor_torch():
    code = "import sys; from benchmarks.gpu import questions; questions.verdict('remat', {}); "
    code += "print({'jax', 'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
