"""Messages of tyro in one line."""

from __future__ import annotations

import re

from jmp_train.errors import nearest

_REPLACEMENTS = {
    r"^Error parsing (experiment\.)?(--)?": "--",
    r"^--\w+Options: ": "",
    r"invalid literal for int\(\) with base 10: (.*)": r"expected an integer, got \1",
    r"could not convert string to float: (.*)": r"expected a number, got \1",
    r"no type matching \{None\}\|INT could be instantiated from \[(.*)\]\.": (
        r"expected an integer or None, got \1"
    ),
    r"no type matching \{None\}\|FLOAT could be instantiated from \[(.*)\]\.": (
        r"expected a number or None, got \1"
    ),
    r"Could not find valid parse for arguments: \[(.*)\]": r"expected numbers, got \1",
    r"^Missing value for argument '(\S+)'.*": r"\1: expected a value",
    r"^--[A-Z]\w*: ": "",  # the class of all fields
}


def one_line(complaint: str) -> str:
    """Return tyro's framed message in one line: the error, then the nearest option.

    >>> one_line("╭─ Unrecognized options ─╮\\n│ Unrecognized options: --rate, 1 │\\n│ ──── │\\n"
    ...          "│ Perhaps you meant: │\\n│     --learning-rate FLOAT │\\n╰───╯")
    'Unrecognized options: --rate, 1; did you mean --learning-rate?'
    """
    sections: list[list[str]] = [[]]
    for row in complaint.splitlines():
        text = row.strip("│ ")
        if set(text) <= set("╭╮╰╯─-") or text.startswith("╭"):  # a rule, or the frame
            sections.append([])
        else:
            sections[-1].append(text)
    if "╭" not in complaint:  # without a frame, which ASCII lacks, the title is a section
        sections = sections[1:]
    first, *rest = [section for section in sections if any(section)]
    message = " ".join(first).strip()
    options = [row.split()[0] for section in rest for row in section if row.startswith("--")]
    for pattern, replacement in _REPLACEMENTS.items():
        message = re.sub(pattern, replacement, message)
    if message.startswith("Unrecognized options") and options:
        return f"{message}; did you mean {options[0]}?"
    if message.startswith("Unrecognized options"):
        return f"{message}; expected --FIELD VALUE, as --help shows them"
    choice = re.fullmatch(
        r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of (.*)\.", message
    )
    if choice:
        given, option, valid = choice.groups()
        names = re.findall(r"'([^']*)'", valid)
        if "None" in names:  # tyro gives these in any order
            names = [*sorted(name for name in names if name != "None"), "None"]
        hint = nearest(given, names)
        return f"{option} is {given!r}; {hint}"
    return message
