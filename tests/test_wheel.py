"""The package as it is installed from a wheel, in an empty environment and another folder."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_room_is_in_the_wheel():
    inits = (ROOT / "jmp_train").glob("*/**/__init__.py")
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in inits}
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert set(packages) == rooms | {"jmp_train", "jmp_train.experiments"}


def test_the_version_is_that_of_the_project():
    import jmp_train

    assert jmp_train.__version__ == PROJECT["project"]["version"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of an environment that has nothing but the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("jmp_train", "experiments"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # else pip finds the checkout
    run = lambda *command: subprocess.run(command, cwd=folder, env=env, check=True)
    run(sys.executable, "-m", "venv", "env")
    pip = (str(folder / "env" / "bin" / "python"), "-m", "pip", "-q", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", "dist", "./source")
    (wheel,) = (folder / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "jmp_train/py.typed" in names and "jmp_train/experiments/mlp.py" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} <= {"jmp_train"}, names
    run(*pip, "install", "-c", str(ROOT / "constraints.txt"), str(wheel))
    return folder / "env"


def first_experiment(jmp_train, folder):
    """What the page on own models does: write, train, evaluate, predict, export."""
    jmp_train("new", "flowers")
    jmp_train("train", "flowers")
    assert "accuracy" in jmp_train("eval", "runs/flowers")
    np.savez(folder / "measurements.npz", x=np.zeros((3, 4), np.float32))
    assert "3 examples" in jmp_train("predict", "runs/flowers", "measurements.npz")
    jmp_train("export", "runs/flowers", "--format", "stablehlo")


@pytest.mark.slow
def test_commands_work_from_any_folder_after_an_install(installed, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    env |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def jmp_train(*arguments):
        command = [str(installed / "bin" / "jmp-train"), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    version = PROJECT["project"]["version"]
    assert jmp_train("--version").startswith(f"jmp-train {version} (jax ")
    assert "mlp_pure_fp16" in jmp_train("list")
    short = ("--steps", "20", "--log-every", "20", "--eval-every", "20", "--checkpoint-every", "20")
    assert "on held-out data after 20 steps" in jmp_train("train", "mlp_bf16", *short)
    assert "fp16" in jmp_train("compare", "linear", "--seeds", "1", *short)

    own = tmp_path / "experiments"
    own.mkdir()
    (own / "linear.py").write_text("from experiments.mlp import FAMILY as F\nFAMILY = F\n")
    (own / "mine.py").write_text("from experiments.mlp import FAMILY as F\nEXPERIMENT = F\n")
    assert "mine" in jmp_train("list")
    first_experiment(jmp_train, tmp_path)
    assert "on held-out data after 20 steps" in jmp_train("train", "mine", *short)


@pytest.mark.slow
def test_the_example_of_the_page_on_testing_passes_with_the_wheel_and_pytest(installed, tmp_path):
    python = str(installed / "bin" / "python")
    quiet = ("-m", "pip", "-q", "--disable-pip-version-check")
    subprocess.run(
        [python, *quiet, "install", "-c", str(ROOT / "constraints.txt"), "pytest"], check=True
    )
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/testing.md").read_text(), re.DOTALL)
    (file,) = [block for block in blocks if block.startswith("# test_pool.py")]
    (tmp_path / "test_pool.py").write_text(file)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        [python, "-m", "pytest", "-q"],
        cwd=tmp_path,
        env=env | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout + done.stderr
