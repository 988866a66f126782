"""Runs for other software: parameters in safetensors, predictions as a StableHLO program."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.config.settings import settings_in
from jmp_train.data.data import own_of
from jmp_train.errors import UsageError, nearest
from jmp_train.records.metrics import strict_json
from jmp_train.records.provenance import package_version, package_versions
from jmp_train.results.cast import cast_array
from jmp_train.results.load import Run
from jmp_train.results.outputs import check_free, whole_files
from jmp_train.runs.build import matmul_precision
from jmp_train.types import Function, Json

FORMATS = ("safetensors", "stablehlo")
PLATFORMS = ("cpu", "cuda", "tpu")
_LARGEST_PROGRAM = 2**31 - 2**24  # the serialised program has offsets of 32 bits
_STATE = "model_state"
_WIDER = "--dtype bfloat16 or float32"


def check_export(format: str, output: Path, *, force: bool = False) -> None:
    """Check what an export needs before it begins.

    Raises:
      UsageError: for an unknown format, an existing file without `force`, and a file of another ending.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}; {nearest(format, FORMATS)}")
    check_free(_files(format, output), force=force)


def export_run(
    run: Run, format: str, output: str | Path, *, dtype: str | None = None, force: bool = False
) -> list[Path]:
    """Write a run for other software.

    Args:
      run: what `load_run` returned.
      format: "safetensors" for the parameters and the model state, or "stablehlo" for the function of
        `run.predict`, with its parameters and for any batch size.
      output: a folder, or a file whose ending is the format.
      dtype: floating dtype of the parameters in safetensors; None keeps theirs. The model state is
        never cast.
      force: whether to write over existing files.

    Returns:
      The files: the arrays or the program, files of the run that its data name, such as
      tokenizer.json, and the manifest, JSON beside it.

    Raises:
      UsageError: as `check_export`; if the files cannot be written; for parameters that overflow
        `dtype`; for a network that cannot be lowered; and for a damaged tokenizer.json.
    """
    check_export(format, Path(output), force=force)
    model, manifest_file = _files(format, Path(output))
    copies = _copies(run)
    files = [model, *(model.with_name(name) for name in copies), manifest_file]
    write: dict[str, Callable[[Path], Json]] = {
        "safetensors": lambda path: _write_safetensors(run, dtype, path),
        "stablehlo": lambda path: _write_stablehlo(run, path),
    }
    with whole_files(files, force=force) as (partial, *copied, manifest):
        contents = write[format](partial)
        if copies:
            contents["files"] = list(copies)
        for path, content in zip(copied, copies.values(), strict=True):
            path.write_bytes(content)
        values = strict_json(_manifest(run, format, files[0].name, contents))
        manifest.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return files


def _files(format: str, output: Path) -> list[Path]:
    """Return the paths of the exported file and of its manifest."""
    ending = f".{format}"
    if output.suffix in {f".{name}" for name in FORMATS} and output.suffix != ending:
        raise UsageError(f"the output is {str(output)!r}; expected {ending!r} as its ending")
    file = output if output.suffix == ending else output / f"model{ending}"
    return [file, file.with_name(file.name + ".json")]


def _copies(run: Run) -> dict[str, bytes]:
    """Return the files that the run's data name, by their names; they are checked first."""
    names = getattr(own_of(run.experiment.data), "run_files", ())
    if names:
        _ = run.tokenizer
    return {name: (run.directory / name).read_bytes() for name in names}


def _manifest(run: Run, format: str, file: str, contents: Json) -> Json:
    precision = run.functions.precision
    evaluations = [
        record
        for record in run.metrics
        if record.get("split") == "eval" and record["step"] == run.step
    ]
    return {
        "format": format,
        "file": file,
        "experiment": run.name,
        "settings": settings_in(run.experiment),
        "precision": {
            "policy": str(precision.model),
            "rules": [f"{rule.pattern}={rule.policy}" for rule in precision.rules.entries],
        },
        "step": run.step,
        "averaged_parameters": run.experiment.ema_decay is not None,
        "metrics": evaluations[-1] if evaluations else None,
        "spec": run.spec.to_json(),
        "versions": package_versions(),
        **contents,
    }


# safetensors


def named_arrays(run: Run) -> dict[str, tuple[list[str], np.ndarray]]:
    """Return the path and the array of each parameter and leaf of the model state, by name.

    A name is the path with dots: `hidden.kernel`. Those of the model state begin with `model_state.`.

    Raises:
      UsageError: for two arrays of one name.
    """
    found: dict[str, tuple[list[str], np.ndarray]] = {}
    for prefix, tree in (([], run.params), ([_STATE], run.model_state)):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            keys = prefix + [jax.tree_util.keystr((key,), simple=True) for key in path]
            name = ".".join(keys)
            if name in found:
                raise UsageError(f"two arrays have the name {name!r}; expected names without dots")
            found[name] = keys, np.asarray(x)
    return found


def _write_safetensors(run: Run, dtype: str | None, path: Path) -> Json:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = named_arrays(run)
    if dtype is not None:
        arrays = {
            name: (keys, x if keys[0] == _STATE else cast_array(name, x, dtype, instead=_WIDER))
            for name, (keys, x) in arrays.items()
        }
    values = {name: np.require(x, requirements="C") for name, (_, x) in arrays.items()}
    producer = f"jmp_train {package_version('jmp-train')}"
    about = {"format": "flax", "producer": producer, "experiment": run.name, "step": str(run.step)}
    try:
        save_file(values, path, metadata=about)
    except SafetensorError as error:  # a full disk among others; it has no errno
        raise OSError(None, str(error)) from None
    return {
        "arrays": {
            name: {
                "path": keys,
                "kind": _STATE if keys[0] == _STATE else "parameter",
                "shape": list(x.shape),
                "dtype": x.dtype.name,
                "sha256": hashlib.sha256(values[name].tobytes()).hexdigest(),
            }
            for name, (keys, x) in arrays.items()
        }
    }


# StableHLO


def _write_stablehlo(run: Run, path: Path) -> Json:
    size = sum(x.nbytes for x in jax.tree.leaves((run.params, run.model_state)))
    if size > _LARGEST_PROGRAM:
        raise UsageError(
            f"the parameters need {size / 2**30:.3g} GiB, and a program takes 2 GiB at most; expected "
            "--format safetensors"
        )
    exported = export_predict(run)
    data = exported.serialize()
    path.write_bytes(data)
    return {
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "inputs": _kinds(exported.in_tree, exported.in_avals, of_call=True),
        "outputs": _kinds(exported.out_tree, exported.out_avals),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def export_predict(run: Run) -> Any:
    """Return the function of `run.predict` as a `jax.export.Exported`.

    It takes a dict of arrays with any number of examples, and returns a dict of arrays. Parameters and
    model state are in the program. It is lowered for all of `PLATFORMS` that the network can be lowered
    for.

    Raises:
      UsageError: if it can be lowered for none.
    """
    state = (run.params, run.model_state)

    def predict(batch: Any) -> Any:
        # Unknown to the compiler, as in `run.predict`: folded constants would round otherwise.
        params, model_state = jax.lax.optimization_barrier(state)
        return run.functions.predict_fn(params, batch, model_state=model_state)

    def one_by_one(batch: Any) -> Any:
        """For a network that needs the number of examples as an integer, such as `len(x)`."""
        alone = lambda example: jax.tree.map(
            lambda y: y[0], predict(jax.tree.map(lambda x: x[None], example))
        )
        return jax.vmap(alone)(batch)

    with matmul_precision(run.experiment.matmul_precision):
        errors: list[Exception] = []
        for function in (predict, one_by_one):
            try:
                return _export_for_platforms(function, run)
            except Exception as error:  # noqa: BLE001  (whatever a network does with a symbol)
                errors.append(error)
    what = (str(errors[-1]).strip() or type(errors[-1]).__name__).splitlines()[0]
    raise UsageError(f"the network cannot be exported: {what}") from errors[-1]


def _export_for_platforms(function: Function, run: Run) -> Any:
    from jax import export

    (size,) = export.symbolic_shape("batch")
    batch = {
        name: jax.ShapeDtypeStruct(
            (size, *run.spec.example[name].shape), run.spec.example[name].dtype
        )
        for name in run.inputs
    }

    def for_(*platforms: str) -> Any:
        return export.export(jax.jit(function), platforms=platforms)(batch)

    try:
        return for_(*PLATFORMS)
    except NotImplementedError:  # from JAX: a platform lacks an operation
        possible = [platform for platform in PLATFORMS if _lowers(for_, platform)]
        return for_(*(possible or PLATFORMS))


def _lowers(for_: Function, platform: str) -> bool:
    try:
        for_(platform)
    except NotImplementedError:  # from JAX, as above
        return False
    return True


def _kinds(tree: Any, avals: Any, *, of_call: bool = False) -> Json:
    values = jax.tree.unflatten(tree, list(avals))
    arrays = values[0][0] if of_call else values
    return {
        name: {"shape": [_dimension(d) for d in x.shape], "dtype": jnp.dtype(x.dtype).name}
        for name, x in arrays.items()
    }


def _dimension(d: Any) -> int | str:
    return d if isinstance(d, int) else str(d)
