"""What is not trusted cannot run code, and what is written stays in the folder that was named."""

import ast
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jmp_train.config.find import experiment_files, find_experiment
from jmp_train.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "jmp_train").rglob("*.py"), *(ROOT / "experiments").glob("*.py")])

RUN_CODE = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "shelve",
    "marshal",
    "joblib",
    "code",
}
TO_THE_NETWORK = {"ssl", "http", "ftplib", "smtplib", "requests", "httpx", "aiohttp"}
WITHIN = {  # a module that may be imported, and what of it may not
    # Grain sends a dataset to its own worker processes; data/streams.py only names a module to it.
    "cloudpickle": {f"cloudpickle.{name}" for name in ("load", "loads", "Pickler", "CloudPickler")},
    "urllib": {"urllib.request"},
    "socket": {"socket.socket", "socket.create_connection", "socket.create_server"},
    "sklearn": {"sklearn.datasets.fetch_openml"},
}
ALLOWED = {  # binds the coordinator's port for a moment, to say that it is in use; nothing is sent
    "jmp_train/runs/processes.py": {"socket.socket"},
}
CALLS = {"eval", "exec", "compile", "__import__", "execfile", "system", "popen", "Unpickler"}
NUMPY_READERS = {"load", "read_array", "NpzFile", "open_memmap"}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def unsafe(text):
    """What a module does that could run what it reads, or reach the network."""
    tree = ast.parse(text)
    found = [
        name
        for name in imported(tree)
        if name.split(".")[0] in RUN_CODE | TO_THE_NETWORK
        or name in WITHIN.get(name.split(".")[0], ())
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        bare = called.rpartition(".")[2]
        if called in CALLS or (bare in {"system", "popen", "Unpickler"}):
            found.append(called)
        if called.startswith("socket.") and bare != "gethostname":  # a run's lock says where it is
            found.append(called)
        if called.startswith("cloudpickle.") and bare != "register_pickle_by_value":
            found.append(called)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        numpy_reader = called.startswith(("np.", "numpy.")) and bare in NUMPY_READERS
        if numpy_reader and keywords.get("allow_pickle") != "False":
            found.append(ast.unparse(node))
        if keywords.get("allow_pickle", "False") != "False" or keywords.get("shell") == "True":
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_run_what_it_reads_or_reach_the_network(path):
    allowed = ALLOWED.get(str(path.relative_to(ROOT)), set())
    assert [what for what in unsafe(path.read_text(encoding="utf-8")) if what not in allowed] == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import shelve as s", "import urllib.request",
        "from urllib import request", "def f():\n    import marshal", "eval('1')", "exec(text)",
        "import os\nos.system('x')", "np.load(p)", "np.load(p, allow_pickle=True)",
        "np.lib.format.read_array(f)", "f(allow_pickle=flag)", "run('x', shell=True)", "import socket\nsocket.create_connection(a)", "from socket import socket",
        "import cloudpickle\ncloudpickle.loads(b)", "from cloudpickle import loads",
    ],
)  # fmt: skip
def test_the_scan_sees_what_it_is_for(text):
    assert unsafe(text)


@pytest.mark.parametrize(
    "text", ["np.load(p, allow_pickle=False)", "nnx.eval_shape(f)", "step.lower(x).compile()"]
)
def test_the_scan_lets_pass_what_is_safe(text):
    assert not unsafe(text)


def test_a_name_does_not_leave_the_folder_of_experiments(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    spy = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nEXPERIMENT = 3\n"
    folder = tmp_path / "experiments"
    (folder / "inner").mkdir(parents=True)
    for path in (tmp_path / "outside.py", folder / "inner" / "deep.py", folder / "_private.py"):
        path.write_text(spy)
    monkeypatch.chdir(tmp_path)
    for name in (
        "../outside", "outside", f"{tmp_path}/outside", f"{tmp_path}/outside.py", "inner/deep",
        "inner.deep", "..outside", "_private", "experiments._private", "inner/../../outside",
    ):  # fmt: skip
        with pytest.raises(UsageError, match="unknown experiment"):
            find_experiment(name)
    assert not ran.exists()
    # A link in the folder is a file of the folder: who may put one there may put code there.
    (folder / "link.py").symlink_to(tmp_path / "outside.py")
    assert "link" in experiment_files() and not ran.exists()
    with pytest.raises(UsageError, match="sets EXPERIMENT to 3"):
        find_experiment("link")
    assert ran.exists()


def listing(folder):
    digest = lambda p: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
    return {p.relative_to(folder).as_posix(): digest(p) for p in folder.rglob("*")}


@pytest.mark.slow  # a process of its own, with a home of its own; tests/cli/test_bad_input.py is quicker
def test_a_run_writes_into_the_directory_that_was_named_and_nowhere_else(tmp_path):
    for name in ("home", "work", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    before = listing(tmp_path)
    import matplotlib

    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "JAX_COMPILATION"))}
    environment = {
        **kept,
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "MPLCONFIGDIR": matplotlib.get_configdir(),  # its list of fonts takes seconds to make
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jmp_train", "train", "linear_fp32", "--run-dir", "a/run"),
            *("--steps", "4", "--optimizer.warmup-steps", "0"),
        ],
        cwd=tmp_path / "work",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = listing(tmp_path)
    assert before.items() <= after.items()
    new = {path for path in after.keys() - before.keys() if not path.startswith("work/a/run/")}
    # The one exception: programs that were compiled may be kept in the user's cache folder.
    cache = {path for path in new if path.startswith("home/.cache/jmp-train")}
    assert new - cache - {"home/.cache"} == {"work/a", "work/a/run"}, new
    assert "work/a/run/config.json" in after and "work/a/run/summary.json" in after
