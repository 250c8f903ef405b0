"""Passes on what ranks write, and remembers the end of what each said on stderr.

Rank 0 speaks for the job: its standard output is our own, so that progress bars and prompts see the
terminal, and its standard error is passed on as it is. The other ranks' lines are passed on whole,
each behind ``[rank N]``.
"""

import os
import re
import select
from collections import deque
from typing import IO

__all__ = ["OutputPipe", "StderrTail", "write_all"]

_CHUNK = 65536
_TAIL_LINES = 400
_LAST_LINES = 20  # shown of a rank that left no traceback

_TRACE_START = re.compile(
    rb"Traceback \(most recent call last\)|^Fatal Python error|^terminate called"
)
_TRACE_LINK = re.compile(
    rb"During handling of the above exception|The above exception was the direct cause"
)
# A line ends with a newline, or with a lone carriage return as progress bars write it.
_LINE = re.compile(rb"[^\r\n]*(?:\r?\n|\r(?!\n))")


class StderrTail:
    """The last lines a rank wrote, and when its last traceback began."""

    def __init__(self) -> None:
        self.trace_began_at: float | None = None
        self._lines: deque[bytes] = deque(maxlen=_TAIL_LINES)
        self._trace_lines: int | None = None  # length of the last traceback and what follows it
        self._is_linked = False

    def add(self, line: bytes, now: float) -> None:
        """Take in one line, with its line end."""
        if _TRACE_LINK.search(line):
            self._is_linked = True
        elif _TRACE_START.search(line):
            # The second traceback of "During handling of ..." belongs to the first.
            if not self._is_linked or self._trace_lines is None:
                self.trace_began_at = now
                self._trace_lines = 0
            self._is_linked = False
        self._lines.append(line)
        if self._trace_lines is not None:
            self._trace_lines += 1

    def excerpt(self) -> str:
        """Return the last traceback and what followed it, or else the last few lines."""
        lines = list(self._lines)
        wanted = _LAST_LINES if self._trace_lines is None else self._trace_lines
        text = b"".join(lines[-wanted:]).decode(errors="replace")
        left_out = wanted - len(lines) if self._trace_lines is not None else 0
        if left_out > 0:
            text = f"... {left_out} lines left out, see above ...\n{text}"
        return text if not text or text.endswith("\n") else text + "\n"


class OutputPipe:
    """The reading end of one rank's output, passed on to one of our descriptors."""

    def __init__(
        self, source: IO[bytes], target: int, prefix: bytes = b"", tail: StderrTail | None = None
    ) -> None:
        """Without ``prefix`` bytes go through as they come, else line by line behind it."""
        self._source = source
        self._target = target
        self._prefix = prefix
        self._tail = tail
        self._partial = b""
        os.set_blocking(source.fileno(), False)

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._source.fileno()

    def pass_on(self, now: float) -> bool:
        """Pass on what is there; return False at the end of the stream."""
        while True:
            try:
                chunk = os.read(self.fileno(), _CHUNK)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            self._take(chunk, now)

    def close(self, now: float) -> None:
        """Pass on an unfinished last line and close."""
        if self._partial:
            self._take(b"\n" if self._prefix else b"", now, is_last=True)
        self._source.close()

    def _take(self, chunk: bytes, now: float, *, is_last: bool = False) -> None:
        data = self._partial + chunk
        # A carriage return at the very end may be half of a line end: wait for what follows.
        stop = len(data) - 1 if data.endswith(b"\r") and not is_last else len(data)
        lines = _LINE.findall(data, 0, stop)
        self._partial = data[sum(map(len, lines)) :]
        if is_last and self._partial:
            lines.append(self._partial)
        if self._tail is not None:
            for line in lines:
                self._tail.add(line, now)
        if self._prefix:
            chunk = b"".join(self._prefix + line for line in lines)
        write_all(self._target, chunk)


def write_all(descriptor: int, data: bytes) -> None:
    """Write ``data`` whole, also to a descriptor a rank has made non-blocking.

    If nobody reads any more (``deepy.py ... | head``), the data is dropped: training goes on.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
        except OSError:
            return
