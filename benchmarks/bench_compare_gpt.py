"""Does a language model reach the same bits per byte in fp16 and bf16 as in fp32, and how quickly?

Runs `compare` on a small gpt on a CPU and on gpt_124m on an accelerator (there float32 at its highest
precision too). The same seed gives each precision the same first parameters and the same batches,
so the seeds are pairs. Equivalence is tested by two one-sided paired t-tests at 5 % (Schuirmann
1987): it holds where the 90 % confidence interval of the mean difference lies within the margin,
which was set before the first run: 0.02 bits per byte, one hundredth of what the best compressor
takes for each byte.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
from record import keep_comparison

from jmp_train.runs.compare import variants_of

MARGIN = 0.02  # bits per byte


def main() -> None:
    """Compares, prints the table and keeps JSON, table and plot."""
    wide = jax.default_backend() != "cpu"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=896 if wide else 64)
    parser.add_argument("--depth", type=int, default=13 if wide else 2)
    parser.add_argument("--heads", type=int, default=14 if wide else 2)
    parser.add_argument("--length", type=int, default=1024 if wide else 64)
    parser.add_argument("--batch-size", type=int, default=32 if wide else 16)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3 if wide else 5)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"seeds is {options.seeds}; expected at least 2, for a deviation")
    family = "gpt_124m" if wide else "gpt"
    variants = {
        label: dataclasses.replace(
            e,
            model=dataclasses.replace(
                e.model, width=options.width, depth=options.depth, heads=options.heads
            ),
            data=dataclasses.replace(e.data, length=options.length),
            optimizer=dataclasses.replace(e.optimizer, warmup_steps=options.steps // 10),
            batch_size=options.batch_size,
            steps=options.steps,
            eval_every=options.steps,
            checkpoint_every=options.steps,
        )
        for label, e in variants_of(
            family, "fp32@highest,fp32,fp16,bf16" if wide else "fp32,fp16,bf16"
        ).items()
    }
    keep_comparison("compare_gpt", family, variants, margin=MARGIN, options=options)


if __name__ == "__main__":
    main()
