"""Giving back the memory of mapped files that were read.

Every page of a mapped file that was looked at counts as this process's until somebody else needs
memory. A tool that reads a whole checkpoint would seem to hold all of it, and in a container with
a limit it would be ended for that.
"""

import ctypes
from pathlib import Path

import torch

__all__ = ["MappedPages"]

_MADV_DONTNEED = 4
_LIMIT_BYTES = 8 << 20


class MappedPages:
    """Lets go of the pages of files below ``directory``, every few megabytes read.

    Only pages that were never written to may be let go; those of tensors read from files aren't.
    """

    def __init__(self, directory: Path) -> None:
        self._prefix = f"{directory.resolve()}/"
        self._read_bytes = 0
        self._madvise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)

    def count(self, tensor: torch.Tensor) -> None:
        """Take note that ``tensor`` was read."""
        self._read_bytes += tensor.numel() * tensor.element_size()
        if self._read_bytes >= _LIMIT_BYTES:
            self._read_bytes = 0
            self.release()

    def release(self) -> None:
        """Let go of every page; reading it again takes it from the file again."""
        if self._madvise is None:
            return
        try:
            lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
        except OSError:
            return  # not Linux: nothing counts these pages there
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith(self._prefix):
                start, stop = (int(address, 16) for address in fields[0].split("-"))
                self._madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED)
