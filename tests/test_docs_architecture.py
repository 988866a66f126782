"""Every path that the architecture page names exists, and its lists are as short as promised."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()
SECTIONS = dict(section.split("\n", 1) for section in PAGE.split("\n## ")[1:])


def paths():
    quoted = re.findall(r"`([\w./]+)`", PAGE)
    pictured = re.findall(r"\[\"([^:\"]+)", PAGE)
    named = [*quoted, *(name for group in pictured for name in group.split(", "))]
    return sorted({name for name in named if name.endswith(("/", ".py", ".md"))})


@pytest.mark.parametrize("path", paths())
def test_path_in_architecture_page_exists(path):
    assert (ROOT / path).exists() or (ROOT / "jmp_train" / path).exists()


@pytest.mark.parametrize("title", SECTIONS)
def test_lives_have_six_stops_and_recipes_five_steps(title):
    most = 6 if title.startswith("The life of") else 5
    assert title.startswith(("The life of", "How to add"))
    assert 1 <= len(re.findall(r"^\d+\. ", SECTIONS[title], re.MULTILINE)) <= most


def test_picture_has_every_room_of_the_package():
    rooms = {file.parent.name for file in (ROOT / "jmp_train").glob("*/*.py")}
    assert {f"{room}/" for room in rooms} <= set(paths())
