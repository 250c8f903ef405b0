"""``<save>/attempts/NNNN.jsonl``: one line per finished step and evaluation of one launch.

A new launch (a requeue, a resume, a roll-back) is a new attempt with the next number. Lines are
only ever appended. What is known of the launch itself is beside it, in ``NNNN.json``
(``attempt_facts.py``).
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron.base.errors import RunDirectoryError
from megatron.ledger.chain import chained_line, split_line

__all__ = [
    "AttemptLog",
    "EvaluationRecord",
    "Line",
    "Record",
    "StepRecord",
    "attempt_files",
    "attempt_lines_path",
    "attempt_number",
    "decode_line",
    "encode_record",
    "flush_interval",
    "next_attempt_number",
    "parse_lines",
    "read_attempt",
    "read_lines",
    "step_of_record",
]

_WHOLE_NUMBERS = {"step", "after_step", "position", "samples"}
_MAX_UNRECORDED_STEPS = 10
_NAME = re.compile(r"(\d{4,})\.jsonl?")


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step consumed and gave."""

    step: int  # from 1; step N makes global_stepN
    position: int  # stream position of the step's first sample
    samples: int  # consecutive positions consumed, over all ranks
    loss: float  # mean over the step's micro batches and data-parallel ranks; may be NaN
    lr: float  # learning rate after the step, as NeoX logs it
    grad_norm: float | None  # global L2 norm before clipping; None if it isn't finite or known
    skipped: bool  # samples consumed, weights unchanged: the fp16 loss scale overflowed
    seconds: float  # wall time of the step
    digest: str | None = None  # of the samples really read; None: not reduced over the ranks yet


@dataclass(frozen=True)
class EvaluationRecord:
    """What one evaluation consumed and gave."""

    stream: str  # "valid" or "test"
    after_step: int
    position: int  # position, in its own stream, of the first sample
    samples: int
    digest: str
    loss: float  # may be NaN
    at_end: bool = False  # made after the loop: the next evaluation reads from ``position`` again


Record = StepRecord | EvaluationRecord


class Line(NamedTuple):
    """One line of an attempt file."""

    number: int  # from 1; 0 if only a part of the file was read
    record: Record
    body: bytes  # what the chain covers
    chain: str | None  # None: written by a release without chains


def attempt_files(save: Path) -> list[Path]:
    """Return the files with the lines of a run directory's attempts, oldest first."""
    return [path for path in _numbered_files(save) if path.suffix == ".jsonl"]


def attempt_number(path: Path) -> int:
    """Return NNNN of ``attempts/NNNN.jsonl``."""
    return int(path.stem)


def attempt_lines_path(save: Path, number: int) -> Path:
    """Return where the lines of an attempt are or would be."""
    return save / "attempts" / f"{number:04d}.jsonl"


def next_attempt_number(save: Path) -> int:
    """Return the number after all that are taken, by lines or by facts."""
    return max((attempt_number(path) for path in _numbered_files(save)), default=0) + 1


def flush_interval(log_interval: int | None) -> int:
    """Return how many steps may wait for their digests."""
    return max(1, min(log_interval or _MAX_UNRECORDED_STEPS, _MAX_UNRECORDED_STEPS))


def read_attempt(path: Path) -> Iterator[StepRecord]:
    """Yield the steps of one attempt. A torn last line (the process was killed) is left out.

    Raises:
        RunDirectoryError: a line before the last one is not a record.
    """
    for line in read_lines(path):
        if isinstance(line.record, StepRecord):
            yield line.record


def read_lines(path: Path) -> Iterator[Line]:
    """Yield every line of one attempt; its chain is not checked.

    A last line without a newline that is no record was torn, or is being written: it is left out.

    Raises:
        RunDirectoryError: any other line is not a record.
    """
    yield from parse_lines(path, path.read_bytes().split(b"\n"), first_number=1)


def parse_lines(
    path: Path, texts: Sequence[bytes], *, first_number: int | None = None
) -> Iterator[Line]:
    """Yield the lines of a part of an attempt file, split at its newlines.

    Args:
        path: of the file, for messages.
        texts: the part; the last one is what stands behind the last newline.
        first_number: of the part's first line, None if that isn't known.

    Raises:
        RunDirectoryError: a line that isn't torn is not a record.
    """
    for index, text in enumerate(texts):
        is_last = index == len(texts) - 1
        if is_last and not text:
            return
        number = 0 if first_number is None else first_number + index
        try:
            yield decode_line(text, number)
        except (ValueError, TypeError, KeyError) as error:
            if is_last:
                return
            where = f"{path}:{number}" if number else str(path)
            raise RunDirectoryError(
                f"{where}: not a record ({error}); the file was changed or damaged"
            ) from error


def step_of_record(record: Record) -> int:
    """Return the step that was done, or after which an evaluation was made."""
    return record.step if isinstance(record, StepRecord) else record.after_step


def encode_record(record: Record) -> bytes:
    """Return a record as a JSON object, as the chain covers it."""
    # JSON has no infinity and no NaN: an overflow's norm, a diverged loss are null.
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in vars(record).items()
    }
    if isinstance(record, StepRecord):
        digest = values.pop("digest")
        if digest is not None:
            first = {name: values.pop(name) for name in ("step", "position", "samples")}
            values = {**first, "digest": digest, **values}
    return json.dumps(values, allow_nan=False).encode()


def decode_line(text: bytes, number: int = 1) -> Line:
    """Return a line that :func:`encode_record` and :mod:`megatron.ledger.chain` made.

    Raises:
        KeyError, TypeError, ValueError: it is no record.
    """
    values: dict[str, Any] = json.loads(text)
    if values["loss"] is None:
        values["loss"] = math.nan
    body, chain = split_line(text)
    values.pop("chain", None)
    record = EvaluationRecord(**values) if "stream" in values else StepRecord(**values)
    numbers = [value for name, value in values.items() if name in _WHOLE_NUMBERS]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers} are not all whole numbers")
    if record.digest is not None:
        int(record.digest, 16)
    return Line(number, record, body, chain)


class AttemptLog:
    """Appends lines to a new attempt file.

    Args:
        save: the run directory.
        number: of the attempt, the next free one if None.
    """

    def __init__(self, save: Path, number: int | None = None) -> None:
        self.number = next_attempt_number(save) if number is None else number
        self.path = attempt_lines_path(save, self.number)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("xb", buffering=0)

    def append(self, record: StepRecord) -> None:
        """Write one line without a chain.

        It survives a kill of this process, not yet a crash of the machine.

        Raises:
            RunDirectoryError: it cannot be written; nothing of it is there.
        """
        self._write(encode_record(record) + b"\n")

    def append_chained(self, records: Iterable[Record], previous: str) -> str:
        """Write lines that continue from chain ``previous``, all at once; return the new head.

        Raises:
            RunDirectoryError: they cannot be written; nothing of them is there.
        """
        lines = []
        for record in records:
            line, previous = chained_line(previous, encode_record(record))
            lines.append(line + b"\n")
        self._write(b"".join(lines))
        return previous

    def sync(self) -> None:
        """Make everything appended so far durable; called before a checkpoint is published.

        Raises:
            RunDirectoryError: that fails.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unrecorded(error) from error

    def close(self) -> None:
        """Sync and close the file."""
        self.sync()
        self._file.close()

    def _write(self, data: bytes) -> None:
        start = self._file.tell()
        try:
            while data:  # an unbuffered write may take only a part
                data = data[self._file.write(data) :]
        except OSError as error:  # whoever goes on must not write behind half a line
            with contextlib.suppress(OSError):
                self._file.truncate(start)
                self._file.seek(start)
            raise self._unrecorded(error) from error

    def _unrecorded(self, error: OSError) -> RunDirectoryError:
        return RunDirectoryError(
            f"{self.path} cannot be written: {error.strerror}. Training stops, for every step has "
            "to be on record; make room there and start the same command again: it goes on from "
            "the last checkpoint"
        )


def _numbered_files(save: Path) -> list[Path]:
    directory = save / "attempts"
    if not directory.is_dir():
        return []
    named = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(named, key=lambda path: (attempt_number(path), path.suffix))
