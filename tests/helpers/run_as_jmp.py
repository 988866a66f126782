"""Run a test file written for jmp with jmp_train in place of jmp, and print the outcome.

    python tests/helpers/run_as_jmp.py path/of/some_test.py

The last line is JSON: how many tests ran, and the names of those that failed and were skipped.
"""

import importlib.util
import json
import sys
import types
import unittest

from absl import flags

import jmp_train
from jmp_train import tree
from jmp_train.loss_scales import states
from jmp_train.numerics import dtypes
from jmp_train.policy import policy


def _module(name: str, *sources: types.ModuleType) -> types.ModuleType:
    """Return a module of jmp that has the names of several of ours, which divides them otherwise."""
    module = types.ModuleType(name)
    for source in sources:
        vars(module).update((k, v) for k, v in vars(source).items() if not k.startswith("__"))
    return module


SUBSTITUTES = {
    "jmp": jmp_train,
    "jmp._src": types.ModuleType("jmp._src"),
    "jmp._src.loss_scale": _module("jmp._src.loss_scale", tree, states),
    "jmp._src.policy": _module("jmp._src.policy", tree, dtypes, policy),
}


def substitute() -> None:
    """Make `import jmp` find jmp_train, and imports of modules of jmp find ours."""
    assert not any(name.split(".")[0] == "jmp" for name in sys.modules), "the real jmp is imported"
    sys.modules.update(SUBSTITUTES)
    for name in ("loss_scale", "policy"):
        setattr(SUBSTITUTES["jmp._src"], name, SUBSTITUTES[f"jmp._src.{name}"])


def run(path: str) -> dict:
    spec = importlib.util.spec_from_file_location("tests_of_jmp", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    result = unittest.TextTestRunner(stream=sys.stderr).run(suite)
    return {
        "run": result.testsRun,
        "failed": [str(test) for test, _ in [*result.failures, *result.errors]],
        "skipped": [str(test) for test, _ in result.skipped],
    }


if __name__ == "__main__":
    substitute()
    flags.FLAGS(sys.argv[:1])
    outcome = run(sys.argv[1])
    for name, module in sys.modules.items():
        if name.split(".")[0] == "jmp":
            assert module is SUBSTITUTES.get(name), f"{name} is jmp's own"
    print(json.dumps(outcome))
