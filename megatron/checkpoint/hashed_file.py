"""Writing a torch file whose digest is known when its last byte is written; nothing is read again.

torch.save's writer only ever appends, so hashing what it hands over is exact.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megatron.base.errors import CheckpointError
from megatron.base.file_digests import FileDigest
from megatron.base.write_points import reach
from megatron.ledger.manifest import StoredFile

__all__ = ["SaveCancelled", "write_torch_file"]

_PIECE_BYTES = 1 << 21  # hashed and written while it is in the processor's cache
_SMALL_WRITES_BYTES = 1 << 18


class SaveCancelled(Exception):  # noqa: N818 - nothing went wrong
    """The save that a file belongs to was given up."""


def write_torch_file(
    content: Any, path: Path, *, is_cancelled: Callable[[], bool] = lambda: False
) -> StoredFile:
    """Write ``content`` with torch.save into a new file, sync it, and return its size and digest.

    Raises:
        CheckpointError: it could not be written: what the system said.
        SaveCancelled: ``is_cancelled`` said so; a part of the file may be there.
    """
    try:
        with _HashedFile(path, is_cancelled) as file:
            torch.save(content, file)
            file.raise_problem()
            file.sync()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
    reach("save: file synced")
    return file.stored()


class _HashedFile:
    """A file object that hashes what it writes.

    An exception from :meth:`write` would pass through torch's C++ writer, which then tells of its
    own confusion instead of a full disk. So the first problem is kept, and what follows is dropped.
    """

    def __init__(self, path: Path, is_cancelled: Callable[[], bool]) -> None:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        self._file = os.fdopen(descriptor, "wb", buffering=_SMALL_WRITES_BYTES)
        self._digest = FileDigest()
        self._is_cancelled = is_cancelled
        self._problem: OSError | SaveCancelled | None = None
        reach("save: file opened")

    def write(self, data: Any) -> int:
        """Take the next bytes; all of them, whatever happens."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE_BYTES):
            if self._problem is None and self._is_cancelled():
                self._problem = SaveCancelled()
            if self._problem is not None:
                break
            piece = view[start : start + _PIECE_BYTES]
            try:
                self._digest.update(piece)
                self._file.write(piece)
            except OSError as error:
                self._problem = error
        return len(view)

    def flush(self) -> None:
        """Part of a file's interface; :meth:`sync` does the work."""

    def raise_problem(self) -> None:
        """Raise what kept the bytes from being written, if anything did."""
        if self._problem is not None:
            raise self._problem

    def sync(self) -> None:
        """Hand every byte to the disk."""
        self._file.flush()
        reach("save: bytes written")
        os.fsync(self._file.fileno())

    def stored(self) -> StoredFile:
        """Return what the file holds."""
        return StoredFile(self._digest.size, self._digest.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # raised by sync, or there is an error to tell already
            self._file.close()
