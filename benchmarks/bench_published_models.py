"""How published models run in half precision: a row a model, JSON, and the page docs/published-models.md.

Each model is randomly initialised and fits a fixed random target, in a process of its own:

    pip install -e '.[models]'
    python benchmarks/bench_published_models.py                 # all of them
    python benchmarks/bench_published_models.py --only GIN GAT  # these again, the other rows kept
    python benchmarks/bench_published_models.py --render        # only the page, from the JSON
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from published_models import MODELS
from record import RESULTS, device_name, keep

import jmp_train as jt

PAGE = Path(__file__).parents[1] / "docs" / "published-models.md"
MARKS = ("<!-- table -->\n", "<!-- end of table -->")
STEPS = 20
LEARNING_RATE = 1e-3
FIRST_SCALE = 2.0**16  # the default of make_step
GRADIENT_SCALE = 2.0**8  # small enough for the gradients that are compared to be finite
LIMIT_S = 300
HALVES = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}
_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")


def _products(jaxpr: Any) -> Iterator[str]:
    """The operand dtypes of the floating matrix products of a jaxpr, bodies included."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name in _PRODUCTS:
            dtypes = [v.aval.dtype for v in eqn.invars[:2]]
            if all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
                yield max(dtypes, key=lambda dtype: dtype.itemsize).name
        for param in eqn.params.values():
            for item in param if isinstance(param, (tuple, list)) else [param]:
                if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                    yield from _products(item)


def _flat(grads: Any) -> np.ndarray:
    return np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(grads)])


def _train(build: Any, inputs: Any, policy: str) -> dict[str, Any]:
    """The products, the gradients and the loss of one model in one precision."""
    params, run = build(policy)
    shape = jax.eval_shape(run, params, inputs).shape
    target = jax.random.normal(jax.random.key(3), shape)

    def loss(params: Any, inputs: Any) -> Any:
        return jnp.mean((run(params, inputs).astype(jnp.float32) - target) ** 2)

    scale = jt.DynamicLossScale(FIRST_SCALE) if policy == "mixed_float16" else None
    stepper = jt.make_step(loss, optax.adamw(LEARNING_RATE), None, loss_scale=scale)
    state = stepper.init(params)
    grad_fn = jt.value_and_grad(loss, None)
    products = list(_products(jax.make_jaxpr(grad_fn)(params, inputs)))
    fixed = jt.StaticLossScale(GRADIENT_SCALE)
    grads = _flat(jax.jit(lambda p, i: grad_fn(p, i, loss_scale=fixed).grads)(params, inputs))
    for _ in range(STEPS):
        state, _ = stepper.step(state, inputs)
    last = float(jax.jit(loss)(state.params, inputs))
    return {"products": products, "grads": grads, "loss": last, "skipped": int(state.skipped)}


def measure(name: str) -> dict[str, Any]:
    """One row: the share of half-precision products, the gradients' cosine, the losses."""
    build, inputs = MODELS[name].make()
    full = _train(build, inputs, "float32")
    row: dict[str, Any] = {"products": len(full["products"]), "float32": {"loss": full["loss"]}}
    for policy, half in HALVES.items():
        try:
            run = _train(build, inputs, policy)
        except Exception as error:  # noqa: BLE001  (whatever a model raises is its answer)
            row[half] = {"failure": _reason(error)}
            continue
        a, b = run["grads"], full["grads"]
        row[half] = {
            "share": run["products"].count(half) / max(len(run["products"]), 1),
            "cosine": float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))),
            "loss": run["loss"],
            "skipped": run["skipped"],
        }
    return row


def _reason(error: BaseException) -> str:
    lines = re.sub(r"/\S*/", "", str(error)).strip().splitlines() or [""]  # no paths of a machine
    return f"{type(error).__name__}: {lines[0]}"[:120]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _row(name: str) -> dict[str, Any]:
    """Measures one model in a child process; what goes wrong there is the row's failure."""
    package = MODELS[name].package
    row = {"package": package, "version": _version(package)}
    if row["version"] is None:
        return {**row, "failure": "not installed"}
    command = [sys.executable, __file__, "--child", name]
    try:
        # Lineax raises on a gradient that is not finite; the step is to be skipped instead.
        child = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=LIMIT_S,
            env={**os.environ, "EQX_ON_ERROR": "nan"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {**row, "failure": f"no result within {LIMIT_S} s"}
    lines = child.stdout.strip().splitlines()
    if child.returncode or not lines:
        return {**row, "failure": f"the process ended with status {child.returncode}"}
    return {**row, **json.loads(lines[-1])}


def render(rows: dict[str, Any]) -> str:
    """The page's table of the rows."""
    header = (
        "| model | package | products in half | cosine, bf16 | cosine, fp16 "
        "| loss, fp32 | bf16 | fp16 | skipped, fp16 |\n"
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
    )
    return header + "".join(_line(name, row) for name, row in rows.items())


def _line(name: str, row: dict[str, Any]) -> str:
    model = f"{name} | {row['package']} {row['version'] or ''}".rstrip()
    if "failure" in row:
        return f"| {model} | {_cell(row['failure'])} | | | | | | |\n"
    runs = [row[half] for half in HALVES.values()]
    failures = [
        f"{half}: {_cell(run['failure'])}"
        for half, run in zip(HALVES.values(), runs, strict=True)
        if "failure" in run
    ]
    shares = {f"{run['share']:.0%} of {row['products']}" for run in runs if "share" in run}
    cells = ["; ".join([*sorted(shares), *failures])]
    cells += [f"{float(run['cosine']):.5f}" if "cosine" in run else "" for run in runs]
    cells += [f"{float(row['float32']['loss']):.4f}"]
    cells += [f"{float(run['loss']):.4f}" if "loss" in run else "" for run in runs]
    cells += [str(runs[-1].get("skipped", ""))]
    return f"| {model} | {' | '.join(cells)} |\n"


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


def with_table(page: str, rows: dict[str, Any]) -> str:
    """A page whose table, between the marks, is that of the rows."""
    before, rest = page.split(MARKS[0])
    return before + MARKS[0] + "\n" + render(rows) + "\n" + MARKS[1] + rest.split(MARKS[1])[1]


def main() -> None:
    """Measures the models, keeps the JSON and writes the page's table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--render", action="store_true", help="write the page from the JSON alone")
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        try:
            row = measure(options.child)
        except Exception as error:  # noqa: BLE001  (the model's own failure)
            row = {"failure": f"in float32 too: {_reason(error)}"}
        print(json.dumps(row))
        return
    path = RESULTS / f"published_models-{device_name()}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    for name in [] if options.render else options.only:
        rows[name] = _row(name)
        print(_line(name, rows[name]), end="", flush=True)
        rows = {known: rows[known] for known in MODELS if known in rows}
        keep("published_models", rows, steps=STEPS, learning_rate=LEARNING_RATE)
    PAGE.write_text(with_table(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
