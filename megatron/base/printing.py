"""Printing from one rank."""

import os

__all__ = ["print_rank_0"]


def print_rank_0(*message: object) -> None:
    """Print ``message`` if this process is global rank 0 (or runs alone)."""
    if os.environ.get("RANK", "0") == "0":
        print(*message, flush=True)  # noqa: T201 - printing is what this function is for
