"""How long until something happens: an import, --help, and the end of a one-step run.

Each is a process of its own, from the start of Python to its end. A run is timed without the
compilation cache, with an empty one, and with the one that it left.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from record import interleaved, keep

FLAX = "import jax, flax, flax.linen, flax.nnx"


def main() -> None:
    """Measures, prints a table and keeps the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--experiment", default="mlp_fp16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = interleaved(processes(Path(folder), options.experiment), rounds=options.rounds)
    rows = [{"what": name, **times} for name, times in seconds.items()]
    for row in rows:
        print("{what:32} {median:6.2f} s ({min:.2f} to {max:.2f})".format(**row))
    flax, ours = seconds["import jax, flax"], seconds["import jax, flax, jmp_train"]
    print(f"jmp_train adds {ours['median'] - flax['median']:.2f} s to the import")
    print(keep("start", rows, **vars(options)))


def processes(folder: Path, experiment: str) -> dict:
    """What to time, by name."""
    count = iter(range(10**6))

    def run(words: list[str], cache: str = "warm") -> None:
        env = os.environ | {"XDG_CACHE_HOME": str(folder / cache)}
        subprocess.run([sys.executable, *words], check=True, capture_output=True, env=env)

    def train(cache: str, *words: str) -> None:
        number = next(count)
        cache = f"{cache}-{number}" if cache == "empty" else cache
        run_dir = str(folder / f"run-{number}")
        fields = ["--steps", "1", "--optimizer.warmup-steps", "0", "--run-dir", run_dir, *words]
        run(["-m", "jmp_train", "train", experiment, *fields], cache)

    return {
        "import jax, flax": lambda: run(["-c", FLAX]),
        "import jax, flax, jmp_train": lambda: run(["-c", FLAX + ", jmp_train"]),
        "--help": lambda: run(["-m", "jmp_train", "--help"]),
        "train NAME --help": lambda: run(["-m", "jmp_train", "train", experiment, "--help"]),
        "one step, no cache": lambda: train("none", "--compilation-cache", "False"),
        "one step, empty cache": lambda: train("empty"),
        "one step, warm cache": lambda: train("warm"),
    }


if __name__ == "__main__":
    main()
