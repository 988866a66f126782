"""The command line: runs a command, and turns errors into a line and an exit status."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from jmp_train.cli.attend import attend, leave, own_output, wants_attention
from jmp_train.errors import UsageError, nearest
from jmp_train.runs.launched import is_attended

# Each is a module of this package with a function `command`, imported when it is called.
_COMMANDS = (
    "compare",
    "eval",
    "explain",
    "export",
    "list",
    "new",
    "pack",
    "plan",
    "predict",
    "profile",
    "train",
)

# What stands for the first argument where the options of a command are shown without one.
_NAMED = {"export": "RUN_DIR", "new": "NAME", "predict": "RUN_DIR"}

_USAGE = """\
usage: jmp-train COMMAND ...

  train NAME [--run-dir DIR | --resume] [--force] [--lr RATE]
          [--FIELD VALUE ...]
      train an experiment, or resume a run: the one in DIR, or with --resume the
      newest in runs/NAME with the same options
  eval RUN_DIR
      evaluate the newest checkpoint of a run
  predict RUN_DIR INPUT [--output FILE] [--checkpoint best|latest|STEP]
          [--policy POLICY] [--batch-size N]
      predict on the examples of a .npz or .npy file, or of a folder
  predict RUN_DIR [FILE | - | --prompt TEXT] [--length N] [--temperature T]
      continue a text with a run of a language model
  export RUN_DIR --format safetensors|stablehlo [--output PATH] [--dtype DTYPE]
      write the parameters, or the network as a program, for other software
  list
      list the experiments
  new NAME [--linen]
      write experiments/NAME.py, a first experiment to change and train
  pack NAME OUT [--shards N] [--data.FIELD VALUE ...]
      write the data of an experiment into ArrayRecord files
  compare FAMILY [--precisions fp32,fp16,bf16] [--seeds N] [--out DIR]
          [--FIELD VALUE ...]
      train one family in several precisions and seeds, and compare
  explain NAME [--mesh AXIS=SIZE,...] [--FIELD VALUE ...]
      print where each parameter lies on a mesh, and the bytes per device
  plan NAME [--device h100|...] [--mesh AXIS=SIZE,...] [--output FILE]
          [--FIELD VALUE ...]
      what a run needs on a device that is not here: memory, communication, time
  profile NAME [--run-dir DIR] [--profile-steps N] [--FIELD VALUE ...]
      trace some steps of an experiment, for Perfetto
  --version
      print the versions of jmp-train and JAX

RUN_DIR is the directory of a run; runs/NAME, for the newest run of NAME; or
latest, for the newest run of all. Ctrl-C saves the state of a run, and prints
the command that resumes it.

Every field of an experiment: jmp-train train NAME --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      argv: the arguments; those of the process by default.

    Returns:
      The exit status: 0 done; 2 wrong arguments or files; 3 training diverged; 4 no usable
      checkpoint, or the last one could not be written; 5 another process of the run was lost; 130, 138
      or 143 stopped by SIGINT, SIGUSR1 or SIGTERM, with the state saved.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name in ("-V", "--version", "version"):
        from jmp_train.records.provenance import package_version

        print(f"jmp-train {package_version('jmp-train')} (jax {package_version('jax')})")
        return 0
    if rest and rest[0] in ("-h", "--help"):
        if name in _NAMED:
            return _run(name, [_NAMED[name], "--help"])
        print(_usage_of(name), end="")
        return 0
    return _run(name, rest)


def console_script() -> None:
    """Run `main`, then exit with its status; 141 where the reader of the output has ended."""
    if wants_attention(sys.argv[1:]):
        sys.exit(attend())
    if is_attended():
        own_output()
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        status = 141
    except Exception:
        if not is_attended():
            raise
        traceback.print_exc()
        status = 1
    if 0 < status < 128 and is_attended():
        leave(status)
    sys.exit(status)


def _usage_of(name: str) -> str:
    if name != "train":
        return _USAGE
    from jmp_train.cli.train import usage

    return usage()


def _run(name: str, arguments: list[str]) -> int:
    """Run a command by name, and return the exit status."""
    try:
        if name not in _COMMANDS:
            raise UsageError(f"unknown command {name!r}; {nearest(name, _COMMANDS)}")
        importlib.import_module(f"jmp_train.cli.{name}").command(arguments)
    except KeyboardInterrupt as error:
        _print_notes(error)
        return 130
    except Exception as error:
        # Imported here, so that --help does without the libraries of training.
        from jmp_train.cli.failures import failure, one_line

        status, text = failure(error)
        if status == 1:
            raise
        keep = "\n" if status == 3 else ""  # the report of a run that diverged has several lines
        print(f"jmp-train: {one_line(text, keep)}", file=sys.stderr)
        if status > 128:
            _print_notes(error)
        return status
    return 0


def _print_notes(error: BaseException) -> None:
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
