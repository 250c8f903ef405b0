"""Opening a file of a directory whose author isn't trusted: a regular file, and that very one.

A symbolic link may lead anywhere, opening a FIFO waits for ever, and a device answers without end.
"""

import os
import stat
from io import BufferedReader
from pathlib import Path

from megatron.base.errors import CheckpointError

__all__ = ["open_regular", "read_small_text"]


def open_regular(path: Path) -> BufferedReader:
    """Open the regular file ``path`` for reading.

    Raises:
        CheckpointError: it is missing, cannot be opened, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a symbolic link; links in a checkpoint are refused, since they lead "
                "anywhere. Copy the checkpoint with its files: cp -rL"
            ) from error
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is {_kind(mode)}, not a file")
    return open(descriptor, "rb")


def read_small_text(path: Path, *, limit_bytes: int) -> str:
    """Return the UTF-8 text of the regular file ``path``.

    Raises:
        CheckpointError: as :func:`open_regular`, or it is longer than ``limit_bytes``, or no text.
    """
    with open_regular(path) as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise CheckpointError(f"{path} is longer than {limit_bytes} bytes, which no such file is")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error.reason}") from error


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"
