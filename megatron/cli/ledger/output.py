"""How answers look: columns of text for people, JSON for programs."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "common_directory", "note", "number", "print_json", "print_table", "say"]

FORMAT = 1
"""Of the JSON answers; raised when a member changes its meaning or goes away."""

_GAP = "  "


def say(*lines: str) -> None:
    """Print lines of an answer."""
    for line in lines:
        print(line)  # noqa: T201 - what a command is for


def note(text: str) -> None:
    """Print what isn't part of the answer: to stderr."""
    print(text, file=sys.stderr)  # noqa: T201 - beside the answer


def print_json(answer: dict[str, Any]) -> None:
    """Print one JSON object, with the number of the format first."""
    json.dump({"format": FORMAT, **answer}, sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns; numbers to the right, None as a dash.

    A heading that ends in ``>`` is a column of numbers.
    """
    names = [heading.rstrip(">") for heading in headings]
    texts = [["-" if value is None else str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *texts, strict=True)]
    for cells in (names, *texts):
        line = _GAP.join(
            f"{cell:>{width}}" if heading.endswith(">") else f"{cell:<{width}}"
            for cell, width, heading in zip(cells, widths, headings, strict=True)
        )
        say(line.rstrip())


def number(value: int) -> str:
    """Return a count with its thousands apart."""
    return f"{value:,}"


def common_directory(paths: Iterable[Path]) -> Path | None:
    """Return the folder that all files lie in, so that tables need only their names."""
    folders = {path.parent for path in paths}
    return folders.pop() if len(folders) == 1 else None
