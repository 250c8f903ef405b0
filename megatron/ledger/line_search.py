"""Looking up lines of an attempt file without reading all of them.

The file of a long run has a hundred thousand lines; finding one by its first bytes takes
milliseconds, parsing all a second.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.ledger.attempts import (
    EvaluationRecord,
    Line,
    StepRecord,
    parse_lines,
    step_of_record,
)

__all__ = ["FileEnd", "find_step", "lines_since", "read_end"]

_FIRST_STEP = re.compile(rb'^\{"step": (\d+), ', re.MULTILINE)


@dataclass(frozen=True)
class FileEnd:
    """What an attempt has written last."""

    chain: str | None  # of the last line; None if there is none
    step: StepRecord | None
    evaluations: dict[str, EvaluationRecord]  # by stream; those that moved its cursor


def lines_since(path: Path, step: int) -> Iterator[Line]:
    """Yield the lines of ``step`` and what follows it, without parsing those before; unnumbered.

    Raises:
        RunDirectoryError: one of them is not a record.
    """
    data = path.read_bytes()
    for line in parse_lines(path, data[_offset(data, step) :].split(b"\n")):
        if step_of_record(line.record) >= step:
            yield line


def find_step(path: Path, step: int) -> StepRecord | None:
    """Return the record of one step; None if the attempt has none.

    Raises:
        RunDirectoryError: its line is not a record.
    """
    data = path.read_bytes()
    for line in parse_lines(path, _one_line(data, _offset(data, step))):
        if isinstance(line.record, StepRecord) and line.record.step == step:
            return line.record
    return None


def read_end(path: Path) -> FileEnd:
    """Return the last lines of each kind; a torn one doesn't count.

    Raises:
        RunDirectoryError: one of them is not a record.
    """
    data = path.read_bytes()
    chain = None
    for line in _backwards(path, data, b"{"):
        chain = line.chain
        break
    step = None
    for line in _backwards(path, data, b'{"step": '):
        if isinstance(line.record, StepRecord):
            step = line.record
            break
    evaluations = {}
    for stream in ("valid", "test"):
        for line in _backwards(path, data, b'{"stream": "%s", ' % stream.encode()):
            if isinstance(line.record, EvaluationRecord) and not line.record.at_end:
                evaluations[stream] = line.record
                break
    return FileEnd(chain, step, evaluations)


def _offset(data: bytes, step: int) -> int:
    """Return where the line of ``step`` begins; if it is missing, 0 before it, the end after it."""
    prefix = b'{"step": %d, ' % step
    if data.startswith(prefix):
        return 0
    found = data.find(b"\n" + prefix)
    if found >= 0:
        return found + 1
    first = _FIRST_STEP.search(data)
    return len(data) if first is not None and int(first[1]) < step else 0


def _backwards(path: Path, data: bytes, prefix: bytes) -> Iterator[Line]:
    """Yield the lines that begin with ``prefix``, the last one first."""
    stop = len(data)
    while stop > 0:
        found = data.rfind(b"\n" + prefix, 0, stop)
        start = found + 1
        if start == 0 and not data.startswith(prefix):
            return
        yield from parse_lines(path, _one_line(data, start))
        stop = start


def _one_line(data: bytes, start: int) -> list[bytes]:
    stop = data.find(b"\n", start)
    return [data[start:]] if stop < 0 else [data[start:stop], b""]
