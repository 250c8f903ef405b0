"""``<save>/launches.jsonl``: how each launch of a job ended, and what was decided then.

Attempts tell what a launch did once it trained; a launch that ended before leaves only its line
here. It is written by whoever started the launch and outlives it (``neox-slurm decide``); nothing
that training depends on is read from it.
"""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

__all__ = ["LAUNCHES_FILE", "Action", "EndedLaunch", "append_launch", "read_launches"]

LAUNCHES_FILE = "launches.jsonl"

Action = Literal["done", "requeue", "stop"]


@dataclass(frozen=True, kw_only=True)
class EndedLaunch:
    """One launch that has ended."""

    time: float  # seconds since the epoch
    job: str | None  # SLURM's number; None: not started by SLURM
    restarts: int  # how often SLURM had requeued the job
    status: int | None  # the launch's exit status; None: the job gave up before it
    attempt: int | None  # the newest attempt of the run then
    has_begun: bool  # whether that attempt is the launch's own
    counts: bool  # whether it counts as a try without progress, if it has begun no attempt
    action: Action
    reason: str


def append_launch(save: Path, launch: EndedLaunch) -> None:
    """Add a line; a run that has no directory gets none.

    Raises:
        OSError: it cannot be written.
    """
    if not save.is_dir():
        return
    line = json.dumps(asdict(launch)).encode() + b"\n"
    file = os.open(save / LAUNCHES_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)


def read_launches(save: Path) -> list[EndedLaunch]:
    """Return the launches that have ended, oldest first; lines that are none are left out."""
    try:
        text = (save / LAUNCHES_FILE).read_text(errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        launch = _decoded(line)
        if launch is not None:
            found.append(launch)
    return found


def _decoded(line: str) -> EndedLaunch | None:
    try:
        values: dict[str, Any] = json.loads(line)
        return EndedLaunch(**{one.name: values[one.name] for one in fields(EndedLaunch)})
    except (ValueError, KeyError, TypeError):
        return None  # torn: the machine went down
