"""How answers look: columns of text for people, JSON for programs."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "FORMAT",
    "common_directory",
    "counted",
    "note",
    "number",
    "print_json",
    "print_table",
    "say",
]

FORMAT = 1
"""Of the JSON answers; raised when a member changes its meaning or goes away."""

_GAP = "  "


def say(*lines: str) -> None:
    """Print lines of an answer."""
    print("\n".join(lines))  # noqa: T201 - what a command is for


def note(text: str) -> None:
    """Print what isn't part of the answer: to stderr."""
    print(text, file=sys.stderr)  # noqa: T201 - beside the answer


def print_json(answer: dict[str, Any]) -> None:
    """Print one JSON object, with the number of the format first.

    Each member is a line, each item of a list of objects too: readable, and encoded by C code,
    which indented JSON isn't.
    """
    numbered = {"format": FORMAT, **answer}
    members = [f"{json.dumps(name)}: {_json(value)}" for name, value in numbered.items()]
    sys.stdout.write("{" + ",\n ".join(members) + "}\n")


def _json(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return "[\n  " + ",\n  ".join(json.dumps(item, default=str) for item in value) + "]"
    return json.dumps(value, default=str)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns; numbers to the right, None as a dash.

    A heading that ends in ``>`` is a column of numbers.
    """
    names = [heading.rstrip(">") for heading in headings]
    texts = [["-" if value is None else str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *texts, strict=True)]
    line = _GAP.join(
        f"{{:{'>' if heading.endswith('>') else '<'}{width}}}"
        for width, heading in zip(widths, headings, strict=True)
    )
    say(*(line.format(*cells).rstrip() for cells in (names, *texts)))


def number(value: int) -> str:
    """Return a count with its thousands apart."""
    return f"{value:,}"


def counted(value: int, what: str) -> str:
    """Return a count of things: ``1 step``, ``2,000 steps``."""
    return f"{number(value)} {what}{'' if value == 1 else 's'}"


def common_directory(paths: Iterable[Path]) -> Path | None:
    """Return the folder that all files lie in, so that tables need only their names."""
    folders = {path.parent for path in set(paths)}
    return folders.pop() if len(folders) == 1 else None
