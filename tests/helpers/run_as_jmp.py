"""Runs a test file written for jmp with jmp_train in jmp's place, and prints what came of it.

    python tests/helpers/run_as_jmp.py path/of/some_test.py

The last line is JSON: how many tests ran, and the names of those that failed and were skipped.
"""

import importlib.util
import json
import sys
import unittest

from absl import flags

import jmp_train
from jmp_train import precision
from jmp_train.loss_scales import states as loss_scale
from jmp_train.policy import policy

SUBSTITUTES = {
    "jmp": jmp_train,
    "jmp._src": precision,
    "jmp._src.loss_scale": loss_scale,
    "jmp._src.policy": policy,
}


def substitute() -> None:
    """Makes `import jmp` find jmp_train, and the modules that jmp's own tests import find ours."""
    assert not any(name.split(".")[0] == "jmp" for name in sys.modules), "the real jmp is imported"
    policy.__dict__["dtype_to_names"] = (
        jmp_train.numerics.dtype_to_names
    )  # jmp keeps it beside Policy
    sys.modules.update(SUBSTITUTES)


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
