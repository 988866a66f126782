"""The README's Python examples run, one after the other, as a reader would paste them."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_examples_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    check = """
assert info.loss.dtype == jnp.float32 and jnp.isfinite(info.loss)
assert state.params["params"]["layers_0"]["kernel"].dtype == jnp.float32
"""
    script = tmp_path / "readme.py"
    script.write_text("\n".join([*blocks, check]))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("True 32768.0")


def test_every_policy_of_the_table_is_one():
    import jmp_train as jt

    table = README.split("## Policies")[1].split("\n\n")[1]
    for row in table.splitlines()[2:]:
        names, param, compute, output, scale = (cell.strip() for cell in row.strip("|").split("|"))
        for name in re.findall(r"`([^`]+)`", names):
            policy = jt.get_policy(name)
            if param in ("float32", "bfloat16", "float16") and name != "auto":
                assert [str(d) for d in (policy.param_dtype, policy.compute_dtype, policy.output_dtype)] == [
                    param, compute, output,
                ]  # fmt: skip
                default = type(jt.default_loss_scale(policy)).__name__
                assert default == ("DynamicLossScale" if "dynamic" in scale else "NoOpLossScale")
