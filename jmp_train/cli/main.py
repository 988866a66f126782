"""The command line: parses, calls, prints."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
from rich.console import Console

from jmp_train.cli.options import parse, typed
from jmp_train.config.experiment import Experiment
from jmp_train.config.find import experiment_files, find_experiment
from jmp_train.config.settings import with_settings
from jmp_train.errors import UsageError, nearest

E = TypeVar("E")

_USAGE = """\
usage: jmp-train COMMAND ...

  train NAME [--run-dir DIR] [--force] [--lr RATE] [--FIELD VALUE ...]
      train an experiment, or resume a run
  eval RUN_DIR
      evaluate a run's newest checkpoint
  predict RUN_DIR --prompt TEXT [--length N] [--temperature T] [--seed N]
      continue a text with a run of a language model
  list
      the experiments
  compare FAMILY [--precisions fp32,fp16,bf16] [--seeds N] [--out DIR]
          [--FIELD VALUE ...]
      one family across precisions and seeds
  --version
      the versions of jmp-train and JAX

Every field of an experiment: jmp-train train NAME --help
"""

_TRAIN_USAGE = """\
usage: jmp-train train NAME [--run-dir DIR] [--force] [--lr RATE]
                            [--FIELD VALUE ...]

Train an experiment, or resume the run in --run-dir.

The fields depend on the experiment; its own help shows each with its value:

  jmp-train train mlp_bf16 --help

Experiments:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
      0 done; 2 the words are off; 3 training diverged; 4 no usable checkpoint, or the last one could
      not be written; 130, 138 or 143 stopped by SIGINT, SIGUSR1 or SIGTERM, with the state saved.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0 if words else 2
    if words[0] in ("-V", "--version", "version"):
        print(f"jmp-train {_version('jmp-train')} (jax {_version('jax')})")
        return 0
    if words[1:] and words[1] in ("-h", "--help"):
        print(_train_usage() if words[0] == "train" else _USAGE, end="")
        return 0
    # Imported here so that --help answers without JAX.
    from jax.errors import JaxRuntimeError

    from jmp_train.runs.checkpoints import NotSaved, NoUsableCheckpoint
    from jmp_train.runs.loop import Diverged
    from jmp_train.runs.train import Stopped

    try:
        if words[0] not in _COMMANDS:
            raise UsageError(f"unknown command {words[0]!r}; {nearest(words[0], _COMMANDS)}")
        _COMMANDS[words[0]](words[1:])
    except UsageError as error:
        return _fail(error, 2)
    except Diverged as error:
        return _fail(error, 3)
    except (NoUsableCheckpoint, NotSaved) as error:
        return _fail(error, 4)
    except Stopped as error:
        return _fail(error, 128 + error.signum)
    except (MemoryError, JaxRuntimeError) as error:
        if isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        what = str(error).partition("\n")[0] or "out of memory"
        hint = "expected a smaller model or batch, or more micro_batches"
        return _fail(UsageError(f"the memory does not suffice: {what}; {hint}"), 2)
    except KeyboardInterrupt:
        return 130
    return 0


def run() -> None:
    """The console script: `main`, then exit with its status."""
    sys.exit(main())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # used from a folder, not installed
        return "not installed"


def _train_usage() -> str:
    names = textwrap.wrap(", ".join(experiment_files()), 78)
    return _TRAIN_USAGE + "".join(f"  {line}\n" for line in names)


def _fail(error: Exception, status: int) -> int:
    # One line, whatever words it quotes; the report of a run that diverged has more.
    kept = "\n" if status == 3 else ""
    text = "".join(c if c.isprintable() or c == kept else ascii(c)[1:-1] for c in str(error))
    print(f"jmp-train: {text}", file=sys.stderr)
    return status


@dataclasses.dataclass(frozen=True)
class TrainArguments(Generic[E]):
    """Train an experiment."""

    experiment: Annotated[E, tyro.conf.arg(name="")]
    run_dir: Path | None = None
    """Folder of the run, which goes on if it holds one; default runs/NAME/TIME."""
    compilation_cache: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Keep compiled programs in the user's cache folder, for a quick start of the next run."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with a run of other settings, as far as its state fits."""


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Train one family across precisions and seeds, and compare."""

    precisions: str = "fp32,fp16,bf16"
    """Which of the family's experiments; @highest behind one sets its matmul precision."""
    seeds: int = 5
    """Runs of each, with the seeds 0 to N - 1."""
    out: Path | None = None
    """Folder of the results; default runs/compare/FAMILY/TIME."""
    compilation_cache: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Keep compiled programs in the user's cache folder, for a quick start of the next run."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; expected at least 1")


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """Continue a text with the newest checkpoint of a run."""

    prompt: str = "The "
    """What to continue."""
    length: int = 200
    """Bytes to add."""
    temperature: float = 0.8
    """0 takes the likeliest byte each time; 1 draws by probability; between, likely ones more often."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt is empty; expected at least one byte")
        if self.length < 1:
            raise ValueError(f"length is {self.length}; expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; expected a number of 0 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; expected 0 to {2**32 - 1}")


@dataclasses.dataclass(frozen=True)
class CompareArguments(CompareOptions, Generic[E]):
    """Train one family across precisions and seeds, and compare."""

    experiment: Annotated[E, tyro.conf.arg(name="")] = dataclasses.field(kw_only=True)


def _train(words: list[str]) -> None:
    from jmp_train.cli.compilation_cache import keep_compiled
    from jmp_train.runs.train import train

    name, words = _positional(words, "train NAME", "the name of an experiment", _experiments)
    experiment = find_experiment(name)
    arguments = parse(
        TrainArguments[typed(experiment)],
        TrainArguments(experiment),
        words,
        f"jmp-train train {name}",
    )
    if arguments.compilation_cache:
        keep_compiled()
    with _folder(arguments.run_dir, Path("runs") / name) as run_dir:
        summary = train(name, arguments.experiment, run_dir, Console(), force=arguments.force)
    results = ", ".join(f"{_words(k)} {v:.4f}" for k, v in summary["eval"].items())
    print(
        f"{name}: {results} on held-out data after {summary['steps']} steps in "
        f"{summary['train_time_s']:.1f} s (and {summary['compile_time_s']:.1f} s to compile)"
    )
    for name, bits in summary["data"].get("bits_per_byte_of_compressors", {}).items():
        print(
            f"{name} on the same text: {bits['alone']:.4f}, or {bits['after_training_text']:.4f} "
            "after the training text"
        )
    print(run_dir)


def _eval(words: list[str]) -> None:
    from jmp_train.cli.compilation_cache import keep_compiled
    from jmp_train.runs.train import evaluate_run

    folder, words = _positional(words, "eval RUN_DIR", "the directory of a run", _newest_runs)
    run_dir = Path(folder)
    experiment = _stored_experiment(run_dir)
    experiment = parse(typed(experiment), experiment, words, f"jmp-train eval {folder}")
    keep_compiled()
    result = evaluate_run(run_dir, experiment)
    step = result.pop("step")
    print(f"step {step}  " + "  ".join(f"{_words(k)} {v:.4f}" for k, v in result.items()))


def _predict(words: list[str]) -> None:
    from jmp_train.cli.compilation_cache import keep_compiled
    from jmp_train.runs.train import predict_run

    folder, words = _positional(words, "predict RUN_DIR", "the directory of a run", _newest_runs)
    options = parse(PredictOptions, PredictOptions(), words, f"jmp-train predict {folder}")
    prompt = options.prompt.encode("utf-8", "surrogateescape")  # as the shell gave it
    experiment = _stored_experiment(Path(folder))
    keep_compiled()
    more = predict_run(
        Path(folder),
        experiment,
        prompt,
        length=options.length,
        temperature=options.temperature,
        seed=options.seed,
    )
    print(printable(prompt + more, sys.stdout.encoding))


def _stored_experiment(run_dir: Path) -> Experiment[Any, Any]:
    """What a run was trained as."""
    from jmp_train.runs.train import read_config

    name, values = read_config(run_dir)
    default = find_experiment(name)
    try:
        return with_settings(default, values)
    except ValueError as error:
        raise UsageError(f"{run_dir / 'config.json'}: {error}") from None


def _list(words: list[str]) -> None:
    from rich.table import Table

    if words:
        raise UsageError(f"unexpected {words[0]!r}; jmp-train list takes no argument")
    table = Table("experiment", "policy", "data", "metric", box=None, header_style="bold")
    broken = {}
    for name in experiment_files():
        try:
            experiment = find_experiment(name)
        except UsageError as error:
            broken[name] = error
            continue
        table.add_row(name, experiment.policy, experiment.data.name, experiment.metric)
    console = Console()
    console.print(table)
    for name, error in broken.items():
        console.print(
            f"{name}: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )


def _compare(words: list[str]) -> None:
    from jmp_train.cli.compilation_cache import keep_compiled
    from jmp_train.runs.compare import compare, variants_of

    family, words = _positional(words, "compare FAMILY", "the name of a family", _families)
    prog = f"jmp-train compare {family}"
    if {"-h", "--help"} & set(words):
        first = next(iter(variants_of(family, CompareOptions.precisions).values()))
        parse(CompareArguments[typed(first)], CompareArguments(experiment=first), words, prog)
    options, fields = parse(CompareOptions, CompareOptions(), words, prog, known_only=True)
    variants = {}
    for label, default in variants_of(family, options.precisions).items():
        variants[label] = parse(typed(default), default, fields, prog)
        for field in ("policy", "seed"):
            if getattr(variants[label], field) != getattr(default, field):
                raise UsageError(f"compare sets --{field} itself; expected no --{field}")
    if options.compilation_cache:
        keep_compiled()
    with _folder(options.out, Path("runs") / "compare" / family) as out:
        compare(family, variants, seeds=options.seeds, out=out, console=Console())


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "compare": _compare,
    "eval": _eval,
    "list": _list,
    "predict": _predict,
    "train": _train,
}


def _positional(
    words: list[str], form: str, what: str, choices: Callable[[], str]
) -> tuple[str, list[str]]:
    if not words or words[0].startswith("-"):
        raise UsageError(f"expected {what}: jmp-train {form}; {choices()}")
    return words[0], words[1:]


def _experiments() -> str:
    return f"experiments are {', '.join(experiment_files())}"


def _families() -> str:
    from jmp_train.runs.compare import families

    return f"families are {', '.join(families())}"


def _newest_runs() -> str:
    """Where the newest runs are, for a command that needs one."""
    from jmp_train.runs.train import read_config

    configs = [
        path
        for form in ("*/*/config.json", "compare/*/*/runs/*/config.json")
        for path in Path("runs").glob(form)
    ]
    found = []
    for config in sorted(configs, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(UsageError):  # one that cannot be read is no use here
            found.append(f"{config.parent} ({read_config(config.parent)[0]})")
        if len(found) == 3:
            break
    if not found:
        return "runs/ holds no run; make one: jmp-train train NAME"
    newest = "run is" if len(found) == 1 else "runs are"
    return f"the newest {newest} {', '.join(found)}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def printable(text: bytes, encoding: str) -> str:
    r"""Bytes as text that is safe to print: what is not UTF-8, a control character other than a new
    line or a tab, one that turns the direction of what is shown, or not in the terminal's encoding, is
    escaped.

    >>> print(printable(b"caf\xc3\xa9 \xff \x1b[31m", "ascii"))
    caf\xe9 \xff \x1b[31m
    """
    decoded = text.decode("utf-8", "backslashreplace")
    shown = "".join(ascii(c)[1:-1] if c not in "\n\t" and _controls(c) else c for c in decoded)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _controls(c: str) -> bool:
    """Whether a character acts on the terminal, or on the order of the characters around it: these
    are U+202A to U+202E and U+2066 to U+2069 (Unicode Standard Annex 9, section 2)."""
    turns = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return unicodedata.category(c) == "Cc" or unicodedata.bidirectional(c) in turns


@contextlib.contextmanager
def _folder(given: Path | None, parent: Path) -> Iterator[Path]:
    """The folder that was given, or a new one, which goes again if a refusal leaves it empty."""
    if given is not None:
        yield given
        return
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    folder = _new_folder(parent)
    try:
        yield folder
    except UsageError:
        with contextlib.suppress(OSError):  # not empty, so not ours alone
            for made in (folder, *missing):
                made.rmdir()
        raise


def _new_folder(parent: Path) -> Path:
    """A new folder named after the time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run that began in the same second
            continue
        except OSError as error:
            raise UsageError(f"{folder} cannot be written: {error.strerror}") from None
        return folder
    raise AssertionError("itertools.count does not end")
