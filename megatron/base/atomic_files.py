"""Files that are either the old one or the new one, never a torn mixture."""

import contextlib
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path

from megatron.base.write_points import reach

__all__ = ["fsync_directory", "is_prepared_name", "write_atomically"]

_PREPARED_NAME = re.compile(r"\..+\.[0-9a-f]{12}\.new")


def write_atomically(
    path: Path, content: str | bytes, *, before_rename: Callable[[], None] = lambda: None
) -> None:
    """Replace ``path`` by ``content``: temporary name beside it, fsync, rename, fsync the folder.

    Args:
        path: the file.
        content: all of it.
        before_rename: called when the content is on disk under its temporary name; whatever it
            raises leaves ``path`` unchanged. Who deletes the temporary file prevents the rename.

    Raises:
        OSError: the folder is missing or cannot be written; ``path`` is then unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    prepared = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        with open(os.open(prepared, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        reach(f"{path.name} prepared")
        before_rename()
        os.replace(prepared, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(prepared)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk's error names no file
        raise
    fsync_directory(path.parent)


def is_prepared_name(name: str) -> bool:
    """Whether a file called ``name`` is what a kill inside :func:`write_atomically` left."""
    return _PREPARED_NAME.fullmatch(name) is not None


def fsync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
