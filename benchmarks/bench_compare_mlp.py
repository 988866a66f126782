"""The published claim, on this device: is an MLP quicker in fp16 and bf16 at equal accuracy?

Runs `compare` on the mlp family: as it is on a CPU; on an accelerator at a width and batch that
fill it, with float32 at its highest precision beside the default (TF32 on a recent NVIDIA GPU).
Equal accuracy means: within 0.0074, by two one-sided paired t-tests at 5 % over the seeds. The held-out
set has 359 images, so that is one binomial standard deviation of an accuracy of 0.98.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
from record import keep_comparison

from jmp_train.runs.compare import variants_of

MARGIN = 0.0074  # of accuracy


def main() -> None:
    """Compares, prints the table and keeps JSON, table and plot."""
    wide = jax.default_backend() != "cpu"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=8192 if wide else 256)
    parser.add_argument("--batch-size", type=int, default=8192 if wide else 128)
    parser.add_argument("--steps", type=int, default=300 if wide else 2000)
    parser.add_argument("--seeds", type=int, default=3 if wide else 5)
    options = parser.parse_args()
    precisions = "fp32@highest,fp32,fp16,bf16" if wide else "fp32,fp16,bf16"
    variants = {
        label: dataclasses.replace(
            e,
            model=dataclasses.replace(e.model, hidden=(options.width, options.width)),
            optimizer=dataclasses.replace(e.optimizer, learning_rate=2e-4 if wide else 2e-3),
            batch_size=options.batch_size,
            steps=options.steps,
            eval_every=options.steps,
            checkpoint_every=options.steps,
        )
        for label, e in variants_of("mlp", precisions).items()
    }
    keep_comparison("compare_mlp", "mlp", variants, margin=MARGIN, options=options)


if __name__ == "__main__":
    main()
