"""``<save>/attempts/NNNN.jsonl``: one line per finished step of one launch.

A new launch (a requeue, a resume, a roll-back) is a new attempt with the next number. Lines are
only ever appended.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from megatron.base.errors import RunDirectoryError

__all__ = ["AttemptLog", "StepRecord", "attempt_files", "read_attempt"]

_NAME = re.compile(r"(\d{4,})\.jsonl")


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


def attempt_files(save: Path) -> list[Path]:
    """Return the attempt files of a run directory, oldest first."""
    directory = save / "attempts"
    if not directory.is_dir():
        return []
    numbered = [
        (match, path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered)]


def read_attempt(path: Path) -> Iterator[StepRecord]:
    """Yield the records of one attempt. A torn last line (the process was killed) is left out.

    Raises:
        RunDirectoryError: a line before the last one is not a record.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            yield _decode(line)
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # no newline behind it: never finished
                return
            raise RunDirectoryError(
                f"{path}:{number}: not a step record ({error}); the file was changed or damaged"
            ) from error


def _encode(record: StepRecord) -> str:
    # JSON has no infinity and no NaN: an overflow's norm, a diverged loss are null.
    values = asdict(record)
    for name in ("loss", "grad_norm"):
        if values[name] is not None and not math.isfinite(values[name]):
            values[name] = None
    return json.dumps(values, allow_nan=False)


def _decode(line: bytes) -> StepRecord:
    values = json.loads(line)
    if values["loss"] is None:
        values["loss"] = math.nan
    return StepRecord(**values)


class AttemptLog:
    """Appends the records of this launch to a new attempt file."""

    def __init__(self, save: Path) -> None:
        directory = save / "attempts"
        directory.mkdir(parents=True, exist_ok=True)
        known = attempt_files(save)
        self.number = int(_NAME.fullmatch(known[-1].name)[1]) + 1 if known else 1  # type: ignore[index]
        self.path = directory / f"{self.number:04d}.jsonl"
        self._file: IO[str] = self.path.open("x", encoding="utf-8")

    def append(self, record: StepRecord) -> None:
        """Write one line; it survives a kill of this process, not yet a crash of the machine."""
        self._file.write(_encode(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make everything appended so far durable; called before a checkpoint is published."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close the file."""
        self.sync()
        self._file.close()
