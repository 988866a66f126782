"""The rows in JAX: ours, and a peer's best step written by hand; and the device's ceilings."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jmp_train as jt
from benchmarks.gpu import hand_written, measure
from benchmarks.gpu.measure import Trainer
from benchmarks.gpu.table import Row, Workload
from jmp_train.models import Gpt, Mlp, Model, ResNet, Vit
from jmp_train.policy.precision import get_precision
from jmp_train.policy.rules import Rules
from jmp_train.spec import DataSpec
from jmp_train.tasks import make_task
from jmp_train.tasks.task import TaskFunctions

POLICIES = {
    "fp32": "float32",
    "tf32": "float32",
    "fp16": "mixed_float16",
    "bf16": "mixed_bfloat16",
}
COMPUTE = {"fp32": jnp.float32, "tf32": jnp.float32, "fp16": jnp.float16, "bf16": jnp.bfloat16}


class Step(NamedTuple):
    """A jitted step, and how to begin."""

    step: Any
    """`step(state, batch) -> (state, loss)`, the state donated; the loss a scalar, or one a step."""
    init: Callable[..., Any]
    """`init(params, model_state) -> state`."""
    skipped: Callable[[Any], Any]
    """Steps skipped so far, out of the state."""


def make(row: Row, workload: Workload, batch: int, toy: bool) -> Trainer:
    """The trainer of a row whose program is in JAX."""
    set_precision(row.precision)
    task = task_of(row, workload)
    make_step = _hand_written if row.program == "hand-written JAX" else _ours
    return trainer(make_step(row, workload, task), task, workload, batch, _steps(row))


def set_precision(precision: str) -> None:
    """What float32 products do in this process: all bits in "fp32", else JAX's default.

    The default is TF32 on an NVIDIA GPU since Ampere.
    """
    jax.config.update("jax_default_matmul_precision", "highest" if precision == "fp32" else None)


def task_of(row: Row, workload: Workload, **changes: Any) -> TaskFunctions:
    """The network of a workload under the row's policy.

    "autocast" and "apply_policy" get network code in float32.

    Args:
      row: gives precision and program.
      workload: the sizes.
      **changes: to the arguments of `Gpt`.
    """
    plain = row.program in ("autocast", "apply_policy")
    rules = Rules(POLICIES[row.precision] if row.program == "apply_policy" else ())
    precision = get_precision("float32" if plain else POLICIES[row.precision], rules)
    if workload.kind == "mlp":
        example = {
            "image": jax.ShapeDtypeStruct((workload.features,), jnp.float32),
            "label": jax.ShapeDtypeStruct((), jnp.int32),
        }
        hidden = (workload.width,) * workload.depth
        model = Model(
            Mlp,
            inputs=lambda spec: spec.size("image"),
            outputs=lambda spec: spec.classes,
            hidden=hidden,
        )
        return make_task(model, "classification", DataSpec(example, workload.classes), precision)
    if workload.kind in ("resnet", "vit"):
        example = {
            "image": jax.ShapeDtypeStruct((workload.features, workload.features, 3), jnp.float32),
            "label": jax.ShapeDtypeStruct((), jnp.int32),
        }
        spec = DataSpec(example, workload.classes)
        return make_task(_image_model(workload), "classification", spec, precision)
    sizes: Any = {
        "width": workload.width,
        "depth": workload.depth,
        "heads": workload.heads,
        "remat": workload.remat,
        "loss_chunk": workload.loss_chunk,
        **changes,
    }
    example = {"tokens": jax.ShapeDtypeStruct((workload.length + 1,), jnp.uint8)}
    return make_task(
        Model(Gpt, vocabulary=lambda spec: spec.classes, **sizes),
        "language_modelling",
        DataSpec(example, workload.classes),
        precision,
    )


def _image_model(workload: Workload) -> Any:
    classes = lambda spec: spec.classes
    size: Any = workload.size
    if workload.kind == "resnet":
        return Model(ResNet, channels=lambda spec: 3, classes=classes, size=size, reduce=4)
    shape = lambda spec: spec.example["image"].shape
    return Model(Vit, image=shape, classes=classes, size=size, patch=workload.patch, drop_path=0.0)


def optimizer_of(workload: Workload) -> optax.GradientTransformation:
    """The optimizer that every program uses."""
    return optax.adamw(workload.learning_rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)


def _ours(row: Row, workload: Workload, task: TaskFunctions) -> Step:
    policy, options = POLICIES[row.precision], {}

    def loss_fn(params: Any, batch: Any, **model_state: Any) -> Any:
        # No accuracy: the other programs compute none.
        loss, _, *changed = task.loss_fn(params, batch, **model_state)
        return (loss, None, *changed) if changed else loss

    if row.program == "autocast":
        loss_fn = jt.autocast(loss_fn, COMPUTE[row.precision])
    if row.program in ("autocast", "apply_policy"):
        policy = None
        options["loss_scale"] = jt.default_loss_scale(jt.get_policy(POLICIES[row.precision]))
    stepper = jt.make_step(loss_fn, optimizer_of(workload), policy, **options)
    return step_of(stepper, _steps(row))


def step_of(stepper: jt.step.Stepper, steps: int = 1) -> Step:
    """A stepper's step, or its scan of several steps, as users call it."""
    init = lambda params, model_state: stepper.init(params, model_state=model_state)
    return Step(stepper.step if steps == 1 else stepper.scan, init, lambda s: s.skipped)


def _hand_written(row: Row, workload: Workload, task: TaskFunctions) -> Step:
    del task
    step, init, skipped = hand_written.make(
        workload, optimizer_of(workload), COMPUTE[row.precision], _steps(row)
    )
    return Step(step, lambda params, _: init(params), skipped)


def _steps(row: Row) -> int:
    return int(dict(row.options).get("steps", 1))


def trainer(
    step: Step, task: TaskFunctions, workload: Workload, batch: int, steps: int = 1
) -> Trainer:
    """Compiles a step, and keeps its state between calls.

    Args:
      step: takes one batch, or `steps` of them along a leading axis.
      task: whose `init` makes the parameters, from key 0.
      workload: what the batches are made for.
      batch: windows or examples.
      steps: of a call.
    """
    params, model_state = jax.jit(task.init)(jax.random.key(0))
    parameters = sum(x.size for x in jax.tree.leaves(params))
    # In one program and donated: copies beside it would be the peak of memory that is reported.
    state = jax.jit(step.init, donate_argnums=(0, 1))(params, model_state)
    del params, model_state
    example = next(measure.batches(workload, batch))
    if steps > 1:
        example = {k: np.stack([v] * steps) for k, v in example.items()}
    began = time.perf_counter()
    # What is compiled here is what the calls below run: JAX keeps it by the lowered program.
    compiled = step.step.lower(state, jax.device_put(example)).compile()
    compile_s = time.perf_counter() - began
    del example

    def call(batch: Any) -> jax.Array:
        nonlocal state
        state, info = step.step(state, batch)
        return getattr(info, "loss", info)

    return Trainer(
        step=call,
        put=jax.device_put,
        wait=lambda loss: float(np.asarray(loss).reshape(-1)[-1]),
        peak_memory=lambda: peak_memory(compiled),
        skipped=lambda: int(step.skipped(state)),
        parameters=parameters,
        compile_s=compile_s,
        steps_per_call=steps,
    )


def peak_memory(compiled: Any) -> int | None:
    """Bytes in use at the peak: the allocator's count, or the compiler's where there is none."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return needed_memory(compiled)


def needed_memory(compiled: Any) -> int | None:
    """Bytes of arguments, results and temporaries of a compiled program."""
    m = compiled.memory_analysis()
    if m is None:
        return None
    own = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.argument_size_in_bytes + m.temp_size_in_bytes + own


def fitting_batch(workload: Workload, memory: int, largest: int) -> int:
    """The largest power of two whose float32 step needs under 60 % of the memory.

    Steps of two small batches are compiled, not run; between them, memory is linear in the batch.

    Args:
      workload: a "gpt".
      memory: of the device, in bytes.
      largest: batch.
    """
    row = Row(workload.name, "fp32", "jmp_train")
    set_precision(row.precision)
    task = task_of(row, workload)
    step = _ours(row, workload, task)
    state = jax.eval_shape(lambda: step.init(*task.init(jax.random.key(0))))

    def needed(batch: int) -> int:
        shape = jax.ShapeDtypeStruct((batch, workload.length + 1), jnp.int32)
        found = needed_memory(step.step.lower(state, {"tokens": shape}).compile())
        if found is None:
            raise RuntimeError("the compiler tells nothing of memory")
        return found

    two, four = needed(2), needed(4)
    each = max((four - two) / 2, 1.0)
    batch = 1
    while 2 * batch <= largest and two + (2 * batch - 2) * each < 0.6 * memory:
        batch *= 2
    return batch


def ceiling(row: Row, workload: Workload) -> dict[str, float]:
    """What the device reaches at best: of products of square matrices, or of copying.

    Returns:
      `tflops` of a product in the row's precision; `gb_per_s`, read and written, for "copy".
    """
    set_precision(row.precision)
    n = workload.width
    key = jax.random.key(0)
    if row.precision == "copy":
        x = jax.random.normal(key, (4 * n, n), jnp.float32)
        # A copy that nothing optimises away: every number read once and written once.
        return {"gb_per_s": 1e-9 * 2 * x.nbytes / _seconds(jax.jit(lambda x: -x), x)}
    x = jax.random.normal(key, (n, n), jnp.float32).astype(COMPUTE[row.precision])
    return {"tflops": 1e-12 * 2 * n**3 / _seconds(jax.jit(lambda x: x @ x), x)}


def _seconds(fn: Any, x: jax.Array, repeats: int = 10, rounds: int = 7) -> float:
    """The quickest round's seconds a call, after one round of warm-up."""
    rounds_s = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        for _ in range(repeats - 1):
            fn(x)
        jax.block_until_ready(fn(x))
        rounds_s.append((time.perf_counter() - began) / repeats)
    return min(rounds_s[1:])
