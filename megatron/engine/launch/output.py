"""Passes on what ranks write, and remembers the end of what each said on stderr.

Lines are passed on whole, so that ranks don't write into each other's. Rank 0 speaks for the job:
its lines come as they are, and a prompt without line end after a moment. The other ranks' lines
stand behind ``[rankN]:``, as torch marks its tracebacks. (On a terminal rank 0's standard output
doesn't come through here at all: it is the terminal, so that progress bars work.)
"""

import os
import re
import select
from collections import deque
from typing import IO

__all__ = ["OutputPipe", "StderrTail", "write_all"]

_CHUNK = 65536  # bytes; as much as a pipe holds
_CHUNKS_AT_ONCE = 16  # so that a rank that never stops writing leaves room for signals
_PROMPT_AFTER_S = 0.5
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

    def lines(self) -> list[str]:
        """Return what is remembered, oldest first, without line ends."""
        return [line.decode(errors="replace").rstrip("\r\n") for line in self._lines]


class OutputPipe:
    """The reading end of one rank's output, passed on to one of our descriptors."""

    def __init__(
        self, source: IO[bytes], target: int, rank: int, tail: StderrTail | None = None
    ) -> None:
        self._source = source
        self._target = target
        self._mark = b"[rank%d]: " % rank
        self._is_marked = rank > 0
        self._tail = tail
        self._partial = b""  # the beginning of a line whose end has not come yet
        self._num_shown = 0  # bytes of it that were passed on already
        self._partial_at = 0.0
        os.set_blocking(source.fileno(), False)

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._source.fileno()

    @property
    def prompt_at(self) -> float | None:
        """When :meth:`show_prompt` should be called; None if there is nothing to show."""
        if self._is_marked or len(self._partial) == self._num_shown:
            return None
        return self._partial_at + _PROMPT_AFTER_S

    def mark(self) -> None:
        """From now on put the rank before each line, of rank 0 too."""
        if not self._is_marked and self._num_shown:
            write_all(self._target, b"\n")  # the beginning of a line is out already
            self._partial, self._num_shown = self._partial[self._num_shown :], 0
        self._is_marked = True

    def show_prompt(self) -> None:
        """Pass on the beginning of a line that is likely to have no end soon."""
        write_all(self._target, self._partial[self._num_shown :])
        self._num_shown = len(self._partial)

    def pass_on(self, now: float) -> bool:
        """Pass on what is there; return False at the end of the stream."""
        for _ in range(_CHUNKS_AT_ONCE):
            try:
                chunk = os.read(self.fileno(), _CHUNK)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            data = self._partial + chunk
            # A carriage return at the very end may be half of a line end: wait for what follows.
            lines = _LINE.findall(data, 0, len(data) - data.endswith(b"\r"))
            self._partial = data[sum(map(len, lines)) :]
            self._partial_at = now
            self._write(lines, now)
        return True

    def close(self, now: float) -> None:
        """Pass on an unfinished last line, with an end, and close."""
        if self._partial:
            self._write([self._partial + b"\n"], now)
        self._source.close()

    def _write(self, lines: list[bytes], now: float) -> None:
        if not lines:
            return
        if self._tail is not None:
            for line in lines:
                self._tail.add(line.removeprefix(self._mark), now)
        if self._is_marked:
            lines = [self._mark + line.removeprefix(self._mark) for line in lines]
        write_all(self._target, b"".join(lines)[self._num_shown :])
        self._num_shown = 0


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
