"""A line of code knows its room: a room imports only from floors below its own."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "jmp_train"

# Rooms and their floors: a room imports from floors below its own.
FLOORS = {
    "errors": 0,
    "types": 0,
    "fields": 1,
    "configurable": 2,
    "spec": 1,
    "whole_folder": 1,
    "pixels": 2,
    "numerics": 1,
    "tree": 2,
    "loss_scales": 3,
    "policy": 4,
    "_jaxpr": 4,
    "_autocast": 5,
    "optim": 5,
    "debug": 6,
    "flax": 6,
    "step": 7,
    "testing": 8,
    "sharding": 5,
    "sources": 6,
    "data": 7,
    "models": 7,
    "tasks": 8,
    "config": 9,
    "records": 8,
    "reports": 10,
    "runs": 11,
    "plan": 12,
    "results": 12,
    "cli": 13,
    "__main__": 14,
}
# Libraries that not every room may know; those that a user may lack are imported where used.
LIBRARIES = {
    "flax": {"flax", "models", "tasks"},
    "grain": {"data", "sources"},
    "matplotlib": {"data", "reports"},
    "cv2": {"sources"},
    "simplejpeg": {"sources"},
    "PIL": {"data", "pixels", "sources"},
    "array_record": {"data", "sources"},
    "datasets": {"sources"},
    "pyarrow": {"sources"},
    "safetensors": {"data", "results", "sources"},
    "optax": {"optim", "step", "tasks"},
    "orbax": {"records"},
    "rich": {"cli", "reports", "runs"},
    "sklearn": {"data"},
    "tensorflow_datasets": {"sources"},
    "mlflow": {"records"},
    "tensorboardX": {"records"},
    "tokenizers": {"sources"},
    "docstring_parser": {"cli"},
    "tyro": {"cli"},
    "wandb": {"records"},
}
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").parts
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
)


@functools.cache
def imports(parts):
    """Every module that a file imports, inside functions too, as dotted names."""
    tree = ast.parse((PACKAGE.joinpath(*parts)).with_suffix(".py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{'/'.join(parts)} has a relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("parts", MODULES, ids="/".join)
def test_a_room_imports_only_from_floors_below(parts):
    room = parts[0]
    for name in imports(parts):
        if name == "jmp_train":
            pytest.fail(f"{'/'.join(parts)} imports the public face, which is above every floor")
        if not name.startswith("jmp_train."):
            continue
        other = name.split(".")[1]
        assert other == room or FLOORS[other] < FLOORS[room], f"{'/'.join(parts)} imports {name}"


@pytest.mark.parametrize("parts", MODULES, ids="/".join)
def test_only_the_rooms_for_it_import_flax_optax_and_files(parts):
    for name in imports(parts):
        library = name.split(".")[0]
        assert parts[0] in LIBRARIES.get(library, {parts[0]}), f"{'/'.join(parts)} imports {name}"


@functools.cache
def lines(parts):
    return len(PACKAGE.joinpath(*parts).with_suffix(".py").read_text().splitlines())


@pytest.mark.parametrize("parts", MODULES, ids="/".join)
def test_no_file_is_above_500_lines(parts):
    assert lines(parts) <= 500


def test_no_test_file_is_above_500_lines():
    tests = Path(__file__).parent.rglob("*.py")
    assert [p.name for p in tests if len(p.read_text().splitlines()) > 500] == []


def test_no_room_but_autocast_has_more_than_a_sixth_of_the_package():
    rooms = dict.fromkeys(FLOORS, 0)
    for parts in MODULES:
        rooms[parts[0]] += lines(parts)
    largest = max(rooms.keys() - {"_autocast"}, key=rooms.__getitem__)
    assert rooms[largest] <= sum(rooms.values()) / 6, (largest, rooms)


def test_a_policy_string_is_parsed_in_one_place():
    """`get_precision` parses; only it and the rules that it makes call `get_policy`."""
    callers = set()
    for parts in MODULES:
        tree = ast.parse(PACKAGE.joinpath(*parts).with_suffix(".py").read_text())
        called = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
        names = [getattr(f, "id", getattr(f, "attr", "")) for f in called]  # plain, or of a module
        if "get_policy" in names:
            callers.add("/".join(parts))
    assert callers == {"policy/precision", "policy/rules"}


def test_nothing_is_defined_in_the_public_face():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    kinds = (ast.Expr, ast.ImportFrom, ast.Assign, ast.If, ast.FunctionDef)
    for node in tree.body:
        assert isinstance(node, kinds)
        if isinstance(node, ast.Assign):
            assert [t.id for t in node.targets if isinstance(t, ast.Name)] in (
                ["__all__"],
                ["_LATER"],
            )
        if isinstance(node, ast.FunctionDef):
            assert node.name == "__getattr__"


def test_importing_the_package_does_not_import_flax():
    code = "import sys, jmp_train; assert 'flax' not in sys.modules; jmp_train.flax.apply_policy"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_face_is_sorted():
    import jmp_train

    assert list(jmp_train.__all__) == sorted(jmp_train.__all__)
    assert all(hasattr(jmp_train, name) for name in jmp_train.__all__)
