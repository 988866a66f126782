"""One run of an experiment: its directory, its resume, its records and its summary."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import signal
import socket
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jmp_train.data.batches import eval_batches, iterate, state_at, train_batches
from jmp_train.config.experiment import Experiment
from jmp_train.config.settings import flatten
from jmp_train.config.warmup import fit_warmup, fitting_warmup
from jmp_train.errors import UsageError
from jmp_train.optim.optimizers import make_optimizer
from jmp_train.loss_scales.states import NoOpLossScale, StaticLossScale
from jmp_train.debug import NonFiniteReport, first_nonfinite
from jmp_train.numerics.histograms import EXPONENTS, exponent_histogram, shares_in
from jmp_train.tree import nonfinite_leaves, path_names
from jmp_train.policy.policy import Policy, get_policy
from jmp_train.tree import widen_to_full
from jmp_train.policy.precision import get_precision
from jmp_train.runs.divergence import Divergence, Float32Gradients, advise
from jmp_train.runs.plots import plot_exponents, plot_run
from jmp_train.data.dataset import Dataset
from jmp_train.tasks.task import Task
from jmp_train.runs.checkpoints import Checkpoints, DoesNotFit, NotSaved, Restored
from jmp_train.step.evaluation import make_evaluate
from jmp_train.runs.loop import Diverged, Every, LastCall, nonfinite_gradients, run_loop
from jmp_train.runs.metrics import MetricsWriter, read_metrics, strict_json, write_json
from jmp_train.runs.progress import RunProgress
from jmp_train.step.state import TrainState
from jmp_train.step.step import Stepper, make_step, no_skip, step_gradients
from jmp_train.step.gradients import GradResult

_MAY_CHANGE = (
    "steps",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "checkpoint_wait",
    "max_skipped_in_row",
    "nonfinite",
    "optimizer.learning_rate",
)
_MAX_ROLLBACKS = 10  # of a whole run; one that needs more has another trouble than a bad batch
_ORDER_OF_DATA = ("batch_size", "steps_per_call", "seed")  # and all of data.*
_STOPS = ("SIGTERM", "SIGINT", "SIGUSR1")  # the last is SLURM's notice before it takes a node back


class Stopped(Exception):
    """A signal ended the run; its state is saved."""

    def __init__(self, signum: int, step: int, run_dir: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}; {run_dir}")
        self.signum = signum


class _Parts(NamedTuple):
    """What an experiment becomes."""

    dataset: Dataset
    task: Task
    stepper: Stepper
    batches: Any  # a Grain dataset: one item for each call of the step
    evaluate: Callable[[Any], dict[str, float]]  # of parameters, on the held-out data


class _Run(NamedTuple):
    """What stays the same while a run lasts."""

    name: str
    experiment: Experiment[Any, Any]
    run_dir: Path
    console: Console
    force: bool
    parts: _Parts
    checkpoints: Checkpoints
    stopped: list[int]  # the signals that have come
    began: float
    asked_warmup: int  # before it was fitted to the experiment's steps


class _Start(NamedTuple):
    """Where a run goes on."""

    step: int
    state: TrainState
    data: dict[str, Any] | None  # state of the data's iterator; None at the beginning
    wall_time_s: float  # spent before
    train_time_s: float
    rollbacks: int = 0  # so far
    calls_left_out: int = 0  # whose batches are not to be trained on


def train(
    name: str,
    experiment: Experiment[Any, Any],
    run_dir: Path,
    console: Console,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Trains an experiment in a run directory, from where that directory stands.

    Args:
      name: the experiment's.
      experiment: what to train.
      run_dir: a folder that holds a run of the same experiment, which goes on; or an empty one, or
        none yet.
      console: where to show progress.
      force: go on with a run or a checkpoint of other settings, as far as its state fits.

    Returns:
      What summary.json holds.

    Raises:
      UsageError: if the directory cannot be written, is another process's, or holds a run of another
        experiment, with other settings, or something that is no run.
      NoUsableCheckpoint: if it holds checkpoints and none can be loaded.
      NotSaved: if the last checkpoint, or the summary, cannot be written.
      Diverged: if training diverges; its words are the report that diverged.txt and diverged.json in
        the run directory hold too. Nothing is saved after the newest checkpoint.
      Stopped: if SIGTERM, SIGINT or SIGUSR1 ended the run, after saving.
    """
    began = time.perf_counter()
    asked_warmup = experiment.optimizer.warmup_steps
    experiment, scaled = fit_warmup(experiment)
    with _stop_signals() as stopped, _matmul_precision(experiment.matmul_precision):
        # Refuses before anything is written.
        _check_directory(run_dir, name, experiment, asked_warmup, force)
        parts = _build(experiment)
        if not (run_dir / "config.json").exists():  # an older run goes on as it began
            _check_batch_size(experiment, parts.dataset)
        with _lock(run_dir, console):
            for line in filter(None, (devices_line(), scaled)):
                _say(console, line)
            # It may have begun since.
            changed = _check_directory(run_dir, name, experiment, asked_warmup, force)
            if changed:
                _say(console, f"changed: {', '.join(changed)}")
            if not (run_dir / "config.json").exists():  # a kill leaves what is known as a run
                _write_config(run_dir, name, experiment)
            with contextlib.closing(_checkpoints(run_dir, experiment, clean=True)) as checkpoints:
                run = _Run(
                    name,
                    experiment,
                    run_dir,
                    console,
                    force,
                    parts,
                    checkpoints,
                    stopped,
                    began,
                    asked_warmup,
                )
                start = _start(run)
                if start.step > experiment.steps:
                    raise UsageError(
                        f"{run_dir} is at step {start.step}; expected --steps of at least that"
                    )
                if start.step:
                    _say(console, f"{run_dir} is at step {start.step}")
                finished = _finished(run_dir, start.step, experiment.steps)
                if finished is not None:
                    return finished
                _write_config(run_dir, name, experiment)
                checkpoints.set_aside_after(start.step)
                return _train_to_the_end(run, start)


def _train_to_the_end(run: _Run, start: _Start) -> dict[str, Any]:
    """Trains, and goes back to the newest checkpoint where that is asked for."""
    compiled, compile_time = _compile(run.experiment, run.parts, start.state)
    while True:
        try:
            return _train(run, start, compiled, compile_time)
        except Diverged as error:
            if error.last is None:
                raise
            with contextlib.suppress(NotSaved):  # what went wrong matters more than what is lost
                run.checkpoints.wait()
            if run.experiment.nonfinite != "rollback" or start.rollbacks >= _MAX_ROLLBACKS:
                raise _explained(run, error) from None
            reason, bad = str(error), error.last.bad
        # Here the error is gone, and with it the state that went wrong.
        before, start = start, _start(run)
        run.checkpoints.set_aside_after(start.step)
        calls = -(-(bad - start.step) // run.experiment.steps_per_call)
        if start.step == before.step:  # whose data does not know of what was left out since
            calls += before.calls_left_out
        batches = calls * run.experiment.steps_per_call
        _say(run.console, f"{reason}: back to step {start.step}, past the next {batches} batches")
        start = start._replace(rollbacks=before.rollbacks + 1, calls_left_out=calls)


def _train(run: _Run, start: _Start, compiled: Any, compile_time: float) -> dict[str, Any]:
    name, experiment, run_dir, console, _, parts, checkpoints, stopped, began = run[:9]
    batches = iterate(parts.batches)
    if start.data is not None:
        batches.set_state(start.data)
    for _ in range(start.calls_left_out):
        next(batches)
    try:
        writer = MetricsWriter(run_dir, resume_step=start.step)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise _not_writable(run_dir, error) from None
    progress = RunProgress(console, start=start.step, total=experiment.steps, name=name)
    evaluated: tuple[int, dict[str, float]] = (-1, {})

    def log(step: int, values: dict[str, Any]) -> None:
        writer.write(step, "train", values)
        progress.train(step, values)

    def evaluate(step: int, state: TrainState) -> None:
        nonlocal evaluated
        evaluated = (step, parts.evaluate(state.eval_params))
        writer.write(step, "eval", evaluated[1])
        progress.evaluation(step, evaluated[1])

    def checkpoint(step: int, state: TrainState, seconds: float) -> None:
        try:
            writer.flush()  # no checkpoint before the records up to it: a resume leaves no gap
        except OSError as error:
            checkpoints.give_up(step, error)
            return
        extra = {
            "config": _config(name, experiment),
            "versions": _versions(),
            "data": batches.get_state(),
            "wall_time_s": start.wall_time_s + time.perf_counter() - began,
            "train_time_s": start.train_time_s + seconds,
            "rollbacks": start.rollbacks,
        }
        checkpoints.save(
            step,
            state,
            extra=extra,
            metrics=evaluated[1] if evaluated[0] == step else None,
            wait=experiment.checkpoint_wait,
        )

    for file in ("diverged.json", "diverged.txt"):  # of an attempt that this one takes up again
        (run_dir / file).unlink(missing_ok=True)
    with contextlib.closing(writer), contextlib.closing(progress):
        result = run_loop(
            compiled,
            start.state,
            batches,
            start=start.step,
            stop=experiment.steps,
            steps_per_call=experiment.steps_per_call,
            every=Every(experiment.log_every, experiment.eval_every, experiment.checkpoint_every),
            log=log,
            evaluate=evaluate,
            checkpoint=checkpoint,
            should_stop=lambda: bool(stopped),
            skips_nonfinite=start.state.last_skip is not None,
            max_skipped_in_row=experiment.max_skipped_in_row,
        )
    checkpoints.wait()
    if result.step == start.step:  # it was finished, but for its summary
        evaluated = (result.step, parts.evaluate(result.state.eval_params))
    summary = _summary(
        name=name,
        experiment=experiment,
        result=result,
        evaluation=evaluated[1] if evaluated[0] == result.step else {},
        compile_time_s=compile_time,
        train_time_s=start.train_time_s + result.seconds,
        wall_time_s=start.wall_time_s + time.perf_counter() - began,
        rollbacks=start.rollbacks,
        memory=compiled.memory_analysis(),
        facts=parts.dataset.facts(),
    )
    unfinished = stopped and result.step < experiment.steps
    try:
        write_json(run_dir / "summary.json", summary)
        if not unfinished:
            plot_run(
                read_metrics(run_dir / "metrics.jsonl"),
                run_dir / "plots",
                title=f"{name}, policy {experiment.policy}",
            )
    except OSError as error:
        with contextlib.suppress(OSError):  # so that the next call writes them all
            (run_dir / "summary.json").unlink()
        if not unfinished:
            raise NotSaved(
                f"summary.json and the plots cannot be written: {error.strerror}; the checkpoint of "
                f"step {result.step} is whole, and the same command again writes them"
            ) from None
    if unfinished:
        raise Stopped(stopped[0], result.step, run_dir)
    return summary


def _explained(run: _Run, error: Diverged) -> Diverged:
    """The error with the whole report for its words."""
    _say(run.console, "diverged; looking for what went non-finite first")
    report = _investigate(run, error)
    return Diverged(f"{report}\n{run.run_dir / 'diverged.json'} holds more", error.last)


def _investigate(run: _Run, error: Diverged) -> Divergence:
    """Finds out what it can about a run that diverged, and writes it into the run's directory."""
    name, experiment, run_dir, parts = run.name, run.experiment, run.run_dir, run.parts
    steps = run.checkpoints.steps()
    last = error.last
    assert last is not None
    state, problems = last.state, []
    operations = float32 = None
    flags = jax.device_get(jax.jit(nonfinite_leaves)(state.params))
    lost = [n for n, bad in zip(path_names(state.params), flags, strict=True) if bad]
    if last.skipped and not lost:
        # As it stood before that step, which changed nothing but the counters and the scale.
        before = state._replace(step=state.step - 1, loss_scale=_scale_of(state, last.loss_scale))
        try:
            operations = _replay(experiment, parts.task, before, last.batch)
            float32 = _float32_gradients(experiment, parts, before, last)
        # The report matters more than any part of it, so what fails here is told in it.
        except Exception as failure:  # noqa: BLE001
            what = f"{type(failure).__name__}: {failure}".splitlines()[0]
            problems.append(f"the last step could not be replayed: {what}")
    elif state.last_skip is None:
        problems.append(
            "the last good state is gone, because the update with that step's gradients was made: so "
            "the step cannot be replayed"
        )

    def fits(rules: tuple[str, ...]) -> bool:
        try:
            experiment.task(parts.dataset.spec, get_precision("float32", rules))
        except ValueError:
            return False
        return True

    skips = state.last_skip is not None
    history = [r for r in read_metrics(run_dir / "metrics.jsonl") if r["split"] == "train"]
    report = Divergence(
        experiment=name,
        reason=str(error),
        step=last.step,
        policy=experiment.policy,
        rules=experiment.rules,
        loss_scale=last.loss_scale,
        skips=skips,
        history=tuple(history[-20:]),
        gradients=tuple(nonfinite_gradients(state)) if last.skipped else (),
        parameters=tuple(lost),
        operations=operations,
        float32=float32,
        problems=tuple(problems),
        advice=advise(
            experiment=experiment,
            operations=operations,
            float32=float32,
            skips=skips,
            loss_scale=last.loss_scale,
            fits=fits,
        ),
        checkpoint=steps[-1] if steps else None,
    )
    with contextlib.suppress(OSError):  # a full disk; the report is the error's words too
        write_json(run_dir / "diverged.json", report.to_json())
        (run_dir / "diverged.txt").write_text(f"{report}\n", encoding="utf-8")
        if float32 is not None and float32.exponents:
            plot_exponents(
                float32.exponents,
                float32.format,
                run_dir / "plots" / "gradient_exponents.png",
                scale=last.loss_scale,
                title=f"{name}: gradients at step {last.step}, in float32",
            )
    return report


def _scale_of(state: TrainState, value: float) -> Any:
    """The loss scale that a step was taken under, as a state that stays as it is."""
    none = isinstance(state.loss_scale, NoOpLossScale)
    return state.loss_scale if none else StaticLossScale(value)


def _replay(
    experiment: Experiment[Any, Any], task: Task, state: TrainState, batch: Any
) -> NonFiniteReport:
    """The operations of a step that went non-finite first."""
    grads = _gradients(experiment, task)

    def gradients(params: Any, batch: Any, model_state: Any) -> dict[str, Any]:
        result = grads(state._replace(params=params, model_state=model_state), batch)
        return {"loss": result.loss, "gradient": result.grads}

    return first_nonfinite(gradients, state.params, batch, state.model_state)


def _float32_gradients(
    experiment: Experiment[Any, Any], parts: _Parts, state: TrainState, last: LastCall
) -> Float32Gradients:
    """The gradients of a step with the same parameters and batch in float32 throughout."""
    full = dataclasses.replace(
        experiment,
        policy="float32",
        rules=(),
        optimizer=dataclasses.replace(experiment.optimizer, parameters="direct"),
        loss_scale=dataclasses.replace(experiment.loss_scale, kind="none"),
    )
    gradients = _gradients(full, _task(full, parts.dataset))
    state = state._replace(params=widen_to_full(state.params), loss_scale=NoOpLossScale())
    dtype = _narrowest(experiment)

    @jax.jit
    def measure(state: TrainState, batch: Any) -> Any:
        result = gradients(state, batch)
        leaves = jax.tree.leaves(result.grads)
        finite = [jnp.where(jnp.isfinite(g), jnp.abs(g), 0).max(initial=0) for g in leaves]
        return (
            result.loss,
            result.finite,
            jnp.stack(finite).max(),
            shares_in(result.grads, dtype, scale=last.loss_scale),
            shares_in(result.grads, dtype),
            exponent_histogram(result.grads).counts,
        )

    loss, finite, largest, scaled, unscaled, counts = jax.device_get(measure(state, last.batch))
    return Float32Gradients(
        loss=float(loss),
        finite=bool(finite),
        largest=float(largest),
        count=sum(x.size for x in jax.tree.leaves(state.params)),
        format=dtype.name,
        shares={k: float(v) for k, v in scaled._asdict().items()},
        shares_unscaled={k: float(v) for k, v in unscaled._asdict().items()},
        exponents={e: int(n) for e, n in zip(EXPONENTS, counts, strict=True) if n},
    )


def _narrowest(experiment: Experiment[Any, Any]) -> Any:
    """The narrowest dtype that a run computes in; of two as wide, the one with the smaller range."""
    dtypes = [policy.compute_dtype for policy in experiment.precision.policies]
    return min(dtypes, key=lambda dtype: (dtype.itemsize, float(jnp.finfo(dtype).max)))


def evaluate_run(run_dir: Path, experiment: Experiment[Any, Any]) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run on its held-out data.

    Args:
      run_dir: holds the run.
      experiment: what was trained, as `read_config` gives it.

    Returns:
      `{"step": ..., metric: ...}`.

    Raises:
      UsageError: if there is no checkpoint, or the newest holds another state.
      NoUsableCheckpoint: if none can be loaded.
    """
    experiment, _ = fit_warmup(experiment)
    with _matmul_precision(experiment.matmul_precision):
        parts = _build(experiment)
        restored = _newest(run_dir, experiment, parts)
        return {"step": restored.step, **parts.evaluate(restored.state.eval_params)}


def predict_run(
    run_dir: Path,
    experiment: Experiment[Any, Any],
    prompt: bytes,
    *,
    length: int,
    temperature: float,
    seed: int,
) -> bytes:
    """Continues a text with the newest checkpoint of a run.

    Args:
      run_dir: holds the run.
      experiment: what was trained, as `read_config` gives it.
      prompt: at least one byte.
      length: bytes to add.
      temperature: what the logits are divided by before one is drawn; at 0 the likeliest is taken.
      seed: of the draws.

    Returns:
      The bytes that follow the prompt.

    Raises:
      UsageError: if there is no checkpoint, or the experiment's model does not continue texts.
      NoUsableCheckpoint: if none can be loaded.
    """
    experiment, _ = fit_warmup(experiment)
    with _matmul_precision(experiment.matmul_precision):
        parts = _build(experiment)
        if parts.task.generate is None:
            raise UsageError(
                f"{run_dir} holds a run on {experiment.data.name}, whose model does not continue "
                "texts; expected a run of a language model, such as gpt_bf16"
            )
        params = _newest(run_dir, experiment, parts).state.eval_params
        params = experiment.precision.cast_to_compute(params)
        generate = jax.jit(parts.task.generate, static_argnames="length")
        tokens = generate(
            params,
            np.frombuffer(prompt, np.uint8),
            jax.random.key(seed),
            length=length,
            temperature=temperature,
        )
        return bytes(np.asarray(tokens, np.uint8))


def _newest(run_dir: Path, experiment: Experiment[Any, Any], parts: _Parts) -> Restored:
    """The newest checkpoint of a run."""
    restored = None
    if (run_dir / "checkpoints").is_dir():
        # By shapes alone: to compute a first state would take as much memory again, and time.
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            jax.eval_shape(lambda: _first_state(experiment, parts)),
        )
        with contextlib.closing(_checkpoints(run_dir, experiment)) as checkpoints:
            try:
                restored = checkpoints.restore_latest(like)
            except DoesNotFit as error:
                raise UsageError(f"{run_dir}: {error}") from None
    if restored is None:
        raise UsageError(f"{run_dir} holds no checkpoint; expected the directory of a run")
    return restored


def read_config(run_dir: Path) -> tuple[str, dict[str, Any]]:
    """The name of a run's experiment, and its settings by dotted path.

    Raises:
      UsageError: if the directory holds no run, or its config.json cannot be read.
    """
    path = run_dir / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        name = values.pop("experiment")
        if not isinstance(name, str):
            raise UsageError(
                f"{path} cannot be read: experiment is {name!r}; expected the name of one"
            )
        return name, flatten(values)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{run_dir} holds no run; expected a directory with config.json") from None
    except KeyError:
        raise UsageError(f"{path} cannot be read: it names no experiment") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def _check_directory(
    run_dir: Path, name: str, experiment: Experiment[Any, Any], asked_warmup: int, force: bool
) -> list[str]:
    """The settings that changed since this directory's run began; changes nothing.

    Raises:
      UsageError: for a directory that this run must not go on in.
    """
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in str(run_dir)):
        raise UsageError(
            f"{str(run_dir)!r} holds characters that cannot be shown; choose another folder"
        )
    if set("[]*?") & set(str(run_dir.resolve())):  # Orbax reads a path as a pattern
        raise UsageError(
            f"{str(run_dir)!r} holds one of the characters []*?; choose another folder"
        )
    try:
        if not (run_dir / "config.json").exists():
            begun = {"lock", "config.json.partial"}  # by a process that was killed
            if run_dir.exists() and {path.name for path in run_dir.iterdir()} - begun:
                raise UsageError(
                    f"{run_dir} is not empty and holds no run; expected a new folder, or a run's"
                )
            return []
    except OSError as error:
        raise UsageError(f"{run_dir} cannot be read: {error.strerror}") from None
    there, values = read_config(run_dir)
    if there != name and not force:
        raise UsageError(f"{run_dir} holds a run of {there!r}; expected one of {name!r}")
    changed = _changed({"experiment": there, **values}, flatten(_config(name, experiment)))
    refused = _refused(changed, values, asked_warmup)
    if refused and not force:
        raise UsageError(
            f"{run_dir} holds a run with other settings: {', '.join(refused)}; expected the same "
            "ones, another --run-dir, or --force to go on with these"
        )
    return list(changed.values())


def _changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What to say of each setting that differs, by its dotted path."""
    fields = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
    return {k: f"{k} {before.get(k)} -> {now.get(k)}" for k in fields}


def _refused(changed: dict[str, str], before: dict[str, Any], asked_warmup: int) -> list[str]:
    """The changes that only --force allows. A warm-up may change if it follows the number of steps:
    if the run has the one that the same warm-up gave it with its steps. A number of classes may be
    given where there was none; one that changes the model does not fit its checkpoint."""
    may_change: set[str] = {*_MAY_CHANGE}
    steps, warmup = before.get("steps"), before.get("optimizer.warmup_steps")
    if isinstance(steps, int) and fitting_warmup(asked_warmup, steps) == warmup:
        may_change.add("optimizer.warmup_steps")
    if before.get("data.classes") is None:
        may_change.add("data.classes")
    return [text for field, text in changed.items() if field not in may_change]


@contextlib.contextmanager
def _lock(run_dir: Path, console: Console) -> Iterator[None]:
    """Keeps other processes from training in a directory. The kernel lets go of the lock when its
    process ends, however it ends; the file stays."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / "lock").open("a+b", buffering=0)
    except OSError as error:
        raise _not_writable(run_dir, error) from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode().strip() or "another process"
            raise UsageError(
                f"{run_dir} is in use by {holder}; wait for its end, or choose another --run-dir"
            ) from None
        except (ImportError, OSError) as error:  # no such system call, or not on this file system
            _say(
                console,
                f"{run_dir} cannot be locked ({error}); make sure that no other process trains there",
            )
        with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _config(name: str, experiment: Experiment[Any, Any]) -> dict[str, Any]:
    return strict_json({"experiment": name, **dataclasses.asdict(experiment)})


def _write_config(run_dir: Path, name: str, experiment: Experiment[Any, Any]) -> None:
    try:
        write_json(run_dir / "config.json", _config(name, experiment))
    except OSError as error:
        raise _not_writable(run_dir, error) from None


def _not_writable(run_dir: Path, error: OSError) -> UsageError:
    return UsageError(f"{run_dir} cannot be written: {error.strerror}")


def _checkpoints(
    run_dir: Path, experiment: Experiment[Any, Any], *, clean: bool = False
) -> Checkpoints:
    try:
        return Checkpoints(
            run_dir / "checkpoints",
            best=experiment.metric,
            highest=experiment.highest,
            clean=clean,
        )
    except OSError as error:
        raise _not_writable(run_dir, error) from None


def _start(run: _Run) -> _Start:
    """The newest checkpoint that can be loaded, else the beginning."""
    name, experiment, run_dir, console, force = run[:5]
    now = flatten(_config(name, experiment))
    changed: dict[str, str] = {}

    def check(step: int, extra: dict[str, Any]) -> None:
        nonlocal changed
        before = flatten(extra["config"])
        changed = _changed(before, now)
        refused = _refused(changed, before, run.asked_warmup)
        if refused and not force:
            raise UsageError(
                f"{run_dir / 'checkpoints' / str(step)} was saved with other settings: "
                f"{', '.join(refused)}; move it away, or give --force to go on from it"
            )

    state = _first_state(experiment, run.parts)
    try:
        restored = run.checkpoints.restore_latest(state, check=check)
    except DoesNotFit as error:
        restored = _with_other_skips(run, state, check)
        if restored is None:
            raise UsageError(f"{run_dir}: {error}") from None
    if restored is None:
        return _Start(0, state, None, 0.0, 0.0)
    step, extra = restored.step, restored.extra
    versions = _changed(extra["versions"], _versions())
    if versions:
        _say(console, f"saved by other versions: {', '.join(versions.values())}")
    data = extra["data"]
    order = [k for k in changed if k in _ORDER_OF_DATA or k.startswith("data.")]
    order = [k for k in order if k != "data.classes"]
    if order:
        calls, rest = divmod(step, experiment.steps_per_call)
        if rest:
            raise UsageError(
                f"{run_dir} is at step {step}; expected --steps-per-call that divides it"
            )
        data = state_at(calls)
        _say(console, f"other batches from step {step} on, for {', '.join(order)} changed")
    times = (extra["wall_time_s"], extra["train_time_s"])
    return _Start(step, restored.state, data, *times, extra["rollbacks"])


def _with_other_skips(run: _Run, state: TrainState, check: Any) -> Restored | None:
    """A checkpoint of a run that skipped steps for one that does not, or the other way round."""
    other = no_skip(state.params, state.model_state) if state.last_skip is None else None
    try:
        restored = run.checkpoints.restore_latest(state._replace(last_skip=other), check=check)
    except DoesNotFit:
        return None
    if restored is None:
        return None
    return restored._replace(state=restored.state._replace(last_skip=state.last_skip))


def _finished(run_dir: Path, step: int, steps: int) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do."""
    if step < steps:
        return None
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        return summary if summary["steps"] == steps and summary["eval"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _dataset(experiment: Experiment[Any, Any]) -> Dataset:
    try:
        return experiment.data.load()
    except (OSError, ValueError) as error:  # a file that is off
        raise UsageError(str(error)) from None


def _check_batch_size(experiment: Experiment[Any, Any], dataset: Dataset) -> None:
    examples = len(dataset.train)
    if experiment.batch_size > examples:
        raise UsageError(
            f"batch_size is {experiment.batch_size}; expected --batch-size of at most {examples}, the "
            "number of examples to train on"
        )


def _task(experiment: Experiment[Any, Any], dataset: Dataset) -> Task:
    try:
        task = experiment.task(dataset.spec)
    except ValueError as error:  # a rule that matches no module, or data without what it reads
        raise UsageError(str(error)) from None
    return task


def _stepper(experiment: Experiment[Any, Any], task: Task) -> Stepper:
    return make_step(
        task.loss_fn,
        make_optimizer(experiment.optimizer, experiment.steps, seed=experiment.seed),
        experiment.precision,
        loss_scale=experiment.loss_scale.make(experiment.precision.default_loss_scale()),
        skip_nonfinite=True if experiment.nonfinite == "skip" else None,
        grad_norm=True,
        ema_decay=experiment.ema_decay,
        micro_batches=experiment.micro_batches,
    )


def _gradients(experiment: Experiment[Any, Any], task: Task) -> Callable[..., GradResult]:
    """The gradients of the step, as a function of its state and batch."""
    return step_gradients(
        task.loss_fn, experiment.precision, micro_batches=experiment.micro_batches
    )


def _build(experiment: Experiment[Any, Any]) -> _Parts:
    dataset = _dataset(experiment)
    task = _task(experiment, dataset)
    stepper = _stepper(experiment, task)
    run = make_evaluate(task.metrics_fn, experiment.precision)
    size = min(experiment.batch_size, len(next(iter(dataset.eval.values()))))
    batches = train_batches(
        dataset.train,
        experiment.batch_size,
        seed=experiment.seed,
        steps_per_call=experiment.steps_per_call,
    )
    return _Parts(
        dataset,
        task,
        stepper,
        batches,
        lambda params: run(params, eval_batches(dataset.eval, size)),
    )


def _first_state(experiment: Experiment[Any, Any], parts: _Parts) -> TrainState:
    init_key, step_key = jax.random.split(jax.random.key(experiment.seed))
    return parts.stepper.init(jax.jit(parts.task.init)(init_key), key=step_key)


def _compile(
    experiment: Experiment[Any, Any], parts: _Parts, state: TrainState
) -> tuple[Any, float]:
    """The compiled step for this run's shapes, and the seconds that took."""
    step = parts.stepper.step if experiment.steps_per_call == 1 else parts.stepper.scan
    batch = parts.batches[0]
    began = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    return compiled, time.perf_counter() - began


def _summary(
    *,
    name: str,
    experiment: Experiment[Any, Any],
    result: Any,
    evaluation: dict[str, float],
    compile_time_s: float,
    train_time_s: float,
    wall_time_s: float,
    rollbacks: int,
    memory: Any,
    facts: dict[str, Any],
) -> dict[str, Any]:
    state = jax.device_get((result.state.loss_scale, result.state.skipped))
    return {
        "experiment": name,
        "policy": experiment.policy,
        "seed": experiment.seed,
        "steps": result.step,
        "wall_time_s": wall_time_s,
        "compile_time_s": compile_time_s,
        "train_time_s": train_time_s,
        "steps_per_second": result.step / train_time_s if train_time_s else 0.0,
        "eval": evaluation,
        "loss_scale": float(state[0].loss_scale),
        "skipped_steps": int(state[1]),
        "rollbacks": rollbacks,
        "parameters": sum(x.size for x in jax.tree.leaves(result.state.params)),
        "peak_memory_bytes": _peak_memory(memory),
        "data": {"name": experiment.data.name, **facts},
        **where(),
    }


def devices_line() -> str:
    """A line for a process that has several devices, of which training uses the first; else ""."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return ""
    return f"training on 1 of {len(devices)} devices ({devices[0]}); for more: make_step(parallel=...)"


def where() -> dict[str, Any]:
    """What a result was had on: the device and the versions."""
    device = jax.devices()[0]
    return {
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    packages = ("jmp-train", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _peak_memory(memory: Any) -> int | None:
    """What the compiled step needs at once, bytes: its arguments, results and temporaries."""
    if memory is None:  # a backend that does not say
        return None
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return whole - memory.alias_size_in_bytes


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # used from a folder, not installed
        return "not installed"


def _matmul_precision(precision: str) -> Any:
    if precision == "default":
        return contextlib.nullcontext()
    return jax.default_matmul_precision(precision)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects a signal of `_STOPS` while it is open; a second one of any kind ends at once."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for signum, previous in before.items():
            signal.signal(signum, previous or signal.SIG_DFL)

    def handle(signum: int, frame: Any) -> None:
        caught.append(signum)
        restore()

    try:
        for signum in (getattr(signal, name, None) for name in _STOPS):
            if signum is not None:  # Windows has no SIGUSR1
                before[signum] = signal.signal(signum, handle)
    except ValueError:  # not the main thread, which alone may handle signals
        pass
    try:
        yield caught
    finally:
        restore()
