"""Printing from one rank."""

import os

__all__ = ["print_rank_0", "printable"]


def print_rank_0(*message: object) -> None:
    """Print ``message`` if this process is global rank 0 (or runs alone)."""
    if os.environ.get("RANK", "0") == "0":
        print(*message, flush=True)  # noqa: T201 - printing is what this function is for


def printable(text: str) -> str:
    """Return ``text`` with everything that would act on a terminal written out as an escape.

    Names in a file of unknown origin may hold such characters.

    Example:
        >>> print(printable("weights \x1b[2J of layer 2"))
        weights \\x1b[2J of layer 2
    """
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
