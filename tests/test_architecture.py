"""A line of code knows its room: a room imports only from floors below its own."""

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "jmp_train"

# The first matching prefix names a module's room; the number is its floor.
FLOORS = {
    "precision": 1,
    "fields": 1.5,
    "task": 2,
    "optim": 2,
    "flax": 2,
    "training": 3,
    "data": 3,
    "models": 3,
    "experiment": 4,
    "report": 4,
    "run": 5,
    "compare": 6,
    "options": 6,
    "cli": 7,
    "__main__": 8,
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
    allowed = {
        "flax": {"flax", "models"},
        "optax": {"optim", "training", "models"},
        "orbax": {"training"},
        "grain": {"data"},
        "sklearn": {"data"},
        "matplotlib": {"report"},
        "tyro": {"cli", "options"},
    }
    for name in imports(parts):
        library = name.split(".")[0]
        assert parts[0] in allowed.get(library, {parts[0]}), f"{'/'.join(parts)} imports {name}"


def test_nothing_is_defined_in_the_public_face():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    for node in tree.body:
        assert isinstance(node, (ast.Expr, ast.ImportFrom, ast.Assign))
        if isinstance(node, ast.Assign):
            assert [t.id for t in node.targets if isinstance(t, ast.Name)] == ["__all__"]


def test_the_public_face_is_sorted():
    import jmp_train

    assert list(jmp_train.__all__) == sorted(jmp_train.__all__)
    assert all(hasattr(jmp_train, name) for name in jmp_train.__all__)
