"""A trained run: its parameters, its network and its predictions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.find import experiment_files, find_experiment
from jmp_train.config.settings import with_settings
from jmp_train.config.warmup import fit_warmup
from jmp_train.data.data import own_of
from jmp_train.data.dataset import DataError
from jmp_train.errors import UsageError, nearest
from jmp_train.policy.precision import get_precision
from jmp_train.records.checkpoints import Checkpoints, DoesNotFit, Restored
from jmp_train.records.metrics import read_metrics
from jmp_train.results.cast import cast_like
from jmp_train.results.inputs import abstract_batch, arrays_read, check_inputs, padded_batches
from jmp_train.runs.build import load_dataset, make_task_of, matmul_precision
from jmp_train.runs.directory import check_path, open_checkpoints, read_config, read_spec
from jmp_train.sources.tokens import Tokens, until_end
from jmp_train.spec import DataSpec
from jmp_train.tasks.task import TaskFunctions
from jmp_train.tree import widen_to_full
from jmp_train.types import Json, PyTree

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained run, as `load_run` returns it."""

    directory: Path
    """The directory of the run."""
    name: str
    """The name of the experiment."""
    experiment: AnyExperiment
    """What was trained, with the settings of the run."""
    spec: DataSpec
    """Shapes and dtypes of one example, and the number of classes."""
    step: int
    """Number of training steps before the checkpoint."""
    params: PyTree = dataclasses.field(repr=False)
    """The parameters for evaluation: their moving average in a run with `ema_decay`."""
    model_state: PyTree = dataclasses.field(repr=False)
    """State of the network besides parameters, such as batch statistics; None if it has none."""
    functions: TaskFunctions = dataclasses.field(repr=False)
    """The network and its task as pure functions of parameters and a batch."""

    @functools.cached_property
    def metrics(self) -> list[Json]:
        """The records of metrics.jsonl, in order; [] if there is no such file.

        Raises:
          UsageError: if the file is damaged.
        """
        path = self.directory / "metrics.jsonl"
        try:
            return read_metrics(path)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UsageError(str(error)) from None

    @functools.cached_property
    def summary(self) -> Json | None:
        """The content of summary.json; None for a run that has not ended.

        Raises:
          UsageError: if the file is damaged.
        """
        path = self.directory / "summary.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from None

    @functools.cached_property
    def model(self) -> Any:
        """The network with its parameters and state, under the precision of the run.

        An NNX class gives the module, set to evaluation: `run.model(x)`. Linen gives the module and its
        variables: `module, variables = run.model`. A pair of functions gives `apply` and the
        parameters.
        """
        return self.functions.network(self.params, self.model_state)

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the arrays that `predict` reads."""
        return arrays_read(self._predict_fn, self.spec)

    def predict(
        self, batch: Any, *, batch_size: int | None = None, transform: bool = True
    ) -> dict[str, np.ndarray]:
        """Predict on examples.

        They are computed in batches of one size, the last one padded, so that another number of
        examples compiles nothing.

        Args:
          batch: arrays by name, whose leading axis counts examples, in the shapes of `spec`; arrays
            that the model does not read, such as labels, are not used. For a model of one input, its
            array alone.
          batch_size: number of examples in a batch; None: that of the experiment.
          transform: whether to apply the transforms of `jmp_train.Data` without random numbers first,
            as evaluation does; examples are then as the function of the data returns them.

        Returns:
          Arrays by name, one row per example; which ones depends on the task. Classification:
          `class`, int32 (examples,), and `probability`, float32 (examples, classes).

        Raises:
          DataError: for a missing array, or one of another shape or kind of number than in training.
          ValueError: for a batch size below 1.
        """
        size = self.experiment.batch_size if batch_size is None else batch_size
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"batch_size is {size!r}; expected a whole number of at least 1")
        if transform:
            batch = self._transformed(batch)
        arrays = check_inputs(batch, self.inputs, self.spec)
        with matmul_precision(self.experiment.matmul_precision):
            kinds = jax.eval_shape(self._predict_fn, abstract_batch(self.spec, size, self.inputs))
            for name, kind in kinds.items():
                if kind.shape[:1] != (size,):
                    raise DataError(
                        f"the task predicts {name!r} of shape {kind.shape} for {size} examples; "
                        "expected one row per example"
                    )
            parts = {name: [np.zeros((0, *x.shape[1:]), x.dtype)] for name, x in kinds.items()}
            for count, part in padded_batches(arrays, size):
                out = jax.device_get(self._predict(self.params, self.model_state, part))
                for name, rows in out.items():
                    parts[name].append(rows[:count])
        return {name: np.concatenate(rows) for name, rows in parts.items()}

    def generate(
        self, prompt: Any, length: int = 200, *, temperature: float = 0.8, seed: int = 0
    ) -> Any:
        """Continue a text.

        Args:
          prompt: text or bytes, for a model of bytes or of a tokenizer; or token numbers.
          length: number of tokens to add.
          temperature: divisor of the logits before a token is drawn; 0 takes the likeliest token.
          seed: random seed of the draws.

        Returns:
          What follows the prompt, in its type: text (bytes that are no UTF-8 as escapes), bytes, or an
          int32 array. In a run on documents, a text follows the beginning of a document, and ends
          before the first end of a document.

        Raises:
          UsageError: if the model does not continue texts; for text if its tokens are neither bytes nor
            those of a tokenizer; and for a tokenizer.json that cannot be read.
          ValueError: for an empty prompt, an unknown token, a length below 1, and a temperature that
            is negative or not finite.
        """
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; expected a number of 0 or more")
        if self.functions.generate is None:
            data = getattr(own_of(self.experiment.data), "name", "its data")
            raise UsageError(
                f"{self.directory} holds a run on {data}, whose model does not continue texts; "
                "expected a run of a language model, such as gpt_bf16"
            )
        tokens = self._tokens(prompt)
        with matmul_precision(self.experiment.matmul_precision):
            key = jax.random.key(seed)
            added = self._generate(self.params, tokens, key, length=length, temperature=temperature)
        added = np.asarray(added)
        if not isinstance(prompt, (str, bytes)):
            return added
        tokenizer = self.tokenizer
        if tokenizer is None:
            text = bytes(added.astype(np.uint8))
        else:
            text = tokenizer.decode(until_end(added, tokenizer.end))
        return text.decode("utf-8", "backslashreplace") if isinstance(prompt, str) else text

    @functools.cached_property
    def tokenizer(self) -> Tokens | None:
        """The tokenizer of a run on documents; None if its texts are bytes, or token numbers.

        Raises:
          DataError: if tokenizer.json in the directory of the run is missing or damaged, or has another
            number of tokens than the model.
        """
        tokens_of = getattr(own_of(self.experiment.data), "tokens_of", None)
        tokenizer = None if tokens_of is None else tokens_of(self.directory)
        if tokenizer is not None and len(tokenizer.sizes) != self.spec.class_count:
            raise DataError(
                f"the tokenizer of {self.directory} has {len(tokenizer.sizes)} tokens; expected "
                f"{self.spec.class_count}, as the model has"
            )
        return tokenizer

    def _tokens(self, prompt: Any) -> np.ndarray:
        if isinstance(prompt, (str, bytes)):
            if self.tokenizer is not None:
                raw = (
                    prompt.encode("utf-8", "surrogateescape") if isinstance(prompt, str) else prompt
                )
                if not raw:
                    raise ValueError("the prompt is empty; expected at least one character")
                (tokens,) = self.tokenizer.encode([raw])
                return np.concatenate([np.array([self.tokenizer.end], tokens.dtype), tokens])
            if self.spec.class_count != 256:
                raise UsageError(
                    f"the prompt is text, and the model has {self.spec.class_count} tokens; expected a "
                    "model of 256 bytes, or token numbers"
                )
            raw = prompt.encode("utf-8", "surrogateescape") if isinstance(prompt, str) else prompt
            return np.frombuffer(raw, np.uint8)
        tokens = np.asarray(prompt)
        count = self.spec.class_count
        if tokens.size and count is not None and not 0 <= tokens.min() <= tokens.max() < count:
            raise ValueError(
                f"the prompt has tokens from {tokens.min()} to {tokens.max()}; expected 0 to {count - 1}"
            )
        return tokens

    def _transformed(self, batch: Any) -> Any:
        """Return a batch after the transforms of evaluation."""
        transformed = getattr(own_of(self.experiment.data), "transformed", None)
        if transformed is None:
            return batch
        if not isinstance(batch, Mapping):
            if len(self.inputs) != 1:
                return batch  # refused by the next check
            batch = {self.inputs[0]: batch}
        return transformed(batch)

    def _predict_fn(self, batch: Any) -> Any:
        return self.functions.predict_fn(self.params, batch, model_state=self.model_state)

    @functools.cached_property
    def _predict(self) -> Any:
        predict_fn = self.functions.predict_fn
        return jax.jit(lambda params, state, batch: predict_fn(params, batch, model_state=state))

    @functools.cached_property
    def _generate(self) -> Any:
        assert self.functions.generate is not None
        return jax.jit(self.functions.generate, static_argnames="length")


def load_run(
    run_dir: str | Path,
    which: str | int = "best",
    *,
    experiment: AnyExperiment | None = None,
    policy: str | None = None,
) -> Run:
    """Load a trained run to predict with it.

    The optimizer state and the data are not loaded. A run of a version that stored no spec.json loads
    its data, for their shapes.

    Args:
      run_dir: the directory of the run.
      which: the checkpoint: "best", by the metric of the experiment or of early stopping; "latest"; or
        its step. Without an evaluated checkpoint, the best is the newest. A damaged checkpoint is passed
        over with a warning, unless its step was given.
      experiment: the experiment of the run, if it is not a file in experiments/; its settings are
        replaced by those of the run.
      policy: precision policy to predict in; None: the policy and the rules of the run.

    Raises:
      UsageError: for a directory that holds no run, an experiment that is not found, a step without a
        checkpoint, and a checkpoint that does not match the model.
      NoUsableCheckpoint: if there are checkpoints and none can be loaded.

    >>> load_run("no/such/folder")
    Traceback (most recent call last):
    jmp_train.errors.UsageError: no/such/folder is not a run directory; expected a directory with ...
    """
    run_dir = Path(run_dir)
    check_path(run_dir)
    name, _ = read_config(run_dir)
    stored, _ = fit_warmup(stored_experiment(run_dir, experiment))
    spec = read_spec(run_dir) or load_dataset(stored).spec
    with matmul_precision(stored.matmul_precision):
        functions = make_task_of(stored, spec)
        shapes = jax.eval_shape(functions.init, jax.random.key(0))
        restored = _restore(run_dir, stored, which, shapes)
        averaged = stored.ema_decay is not None
        params, state = restored.state["ema" if averaged else "params"], shapes[1]
        if state is not None:
            state = restored.state["model_state"]
        if policy is not None:
            try:
                functions = make_task_of(stored, spec, get_precision(policy))
            except ValueError as error:
                raise UsageError(str(error)) from None
            wanted, _ = jax.eval_shape(functions.init, jax.random.key(0))
            params = cast_like(params, wanted)
    return Run(
        directory=run_dir,
        name=name,
        experiment=stored,
        spec=spec,
        step=restored.step,
        params=params,
        model_state=state,
        functions=functions,
    )


def stored_experiment(run_dir: Path, default: AnyExperiment | None = None) -> AnyExperiment:
    """Return the experiment that a run was trained as.

    Args:
      run_dir: the directory of the run.
      default: the experiment whose settings are replaced by those of the run; None: the one in
        experiments/ with the name of the run's.

    Raises:
      UsageError: if the directory is not a run directory, its experiment is not found, or it has
        settings that its experiment does not take.
    """
    name, values = read_config(run_dir)
    if default is None:
        files = experiment_files()
        if name not in files:
            hint = nearest(name, files) if files else "there is no experiments/ folder"
            raise UsageError(
                f"{run_dir} holds a run of the unknown experiment {name!r}; {hint} "
                "(its file may have been moved; in Python, load_run takes experiment=...)"
            )
        default = find_experiment(name)
    try:
        return with_settings(default, values)
    except ValueError as error:
        raise UsageError(f"{run_dir / 'config.json'}: {error}") from None


def _restore(
    run_dir: Path, experiment: AnyExperiment, which: str | int, shapes: tuple[PyTree, PyTree]
) -> Restored:
    """Restore what predictions need of a checkpoint: parameters, or their average, and model state."""
    params, state = shapes
    averaged = experiment.ema_decay is not None
    wide_params, wide_state = jax.eval_shape(widen_to_full, shapes)
    like: Json = {"ema": wide_params} if averaged else {"params": params}
    if state is not None:
        like["model_state"] = wide_state
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(lambda: like),
    )
    restored = None
    if (run_dir / "checkpoints").is_dir():
        with contextlib.closing(open_checkpoints(run_dir, experiment)) as checkpoints:
            steps = _steps_to_try(run_dir, checkpoints, which)
            try:
                # A run that went on in another precision has checkpoints of both.
                restored = checkpoints.restore_first(steps, like, parts=like.keys(), casts=True)
            except DoesNotFit as error:
                raise UsageError(f"{run_dir}: {error}") from None
    if restored is None:
        raise UsageError(f"{run_dir} has no checkpoint; expected the directory of a run")
    return restored


def _steps_to_try(run_dir: Path, checkpoints: Checkpoints, which: str | int) -> list[int]:
    steps = checkpoints.steps()[::-1]
    if which == "latest" or not steps:
        return steps
    best = checkpoints.best_first()
    if which == "best":
        if not best:
            log.warning("no checkpoint of %s was evaluated; taking the newest", run_dir)
        return best or steps
    step = int(which) if str(which).isdecimal() else which
    if step in steps:
        return [int(step)]
    found = ", ".join(f"{n} (best)" if n in best[:1] else str(n) for n in sorted(steps))
    raise UsageError(
        f"{run_dir} has no checkpoint {which!r}; expected best, latest, or one of the steps {found}"
    )
