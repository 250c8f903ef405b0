"""Whether every node of a job sees one and the same directory, and may write there.

Rank 0 leaves a mark; each node looks for it and leaves an answer of its own. Nothing is measured by
clocks, and a file server that shows new files late is waited for.
"""

import contextlib
import os
import time
from pathlib import Path

__all__ = ["answer_mark", "leave_mark", "remove_marks"]

_PREFIX = ".probe-"
_VISIBLE_AFTER_S = 30.0  # what NFS's default caching of directory entries (acdirmax) may take


def leave_mark(directory: Path, token: str) -> None:
    """Write the mark that the other nodes look for.

    Raises:
        OSError: the directory cannot be written.
    """
    _write(directory / f"{_PREFIX}{token}", token)


def answer_mark(
    directory: Path, token: str, node: str, *, timeout_s: float = _VISIBLE_AFTER_S
) -> str | None:
    """Look for the mark, and write an answer beside it; return what is wrong, None if it works.

    Args:
        directory: as this node sees it.
        token: the mark's.
        node: a name that no other node answers with.
        timeout_s: how long the mark may take to be seen.
    """
    deadline = time.monotonic() + timeout_s
    while not _sees(directory / f"{_PREFIX}{token}", token):
        if time.monotonic() >= deadline:
            return f"does not see what rank 0 wrote there {timeout_s:.0f} s ago"
        # Listing asks the server anew where a missing name may be remembered.
        with contextlib.suppress(OSError):
            os.listdir(directory)
        time.sleep(0.1)
    try:
        _write(directory / f"{_PREFIX}{token}-{node}", node)
    except OSError as error:
        return f"may not write there: {error.strerror}"
    return None


def remove_marks(directory: Path) -> None:
    """Remove all marks and answers, those of killed launches too; call it as the only writer."""
    for path in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            path.unlink()


def _sees(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False


def _write(path: Path, content: str) -> None:
    with path.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
