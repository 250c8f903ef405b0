"""Closes the record of an attempt whose ranks were killed and couldn't do it themselves."""

import os
from dataclasses import replace
from pathlib import Path

from megatron.ledger.attempt_facts import (
    AttemptFacts,
    Stop,
    read_attempt_facts,
    write_attempt_facts,
)
from megatron.ledger.attempts import attempt_lines_path, next_attempt_number
from megatron.ledger.environment import LAUNCH
from megatron.ledger.line_search import read_end

__all__ = ["close_dead_attempt"]


def close_dead_attempt(
    save: Path, launch: str, *, reason: str, now: float, done_step: int | None = None
) -> AttemptFacts | None:
    """Note why the attempt that a launch made has ended, unless the attempt has noted it itself.

    None of its ranks may be alive.

    Args:
        save: the run directory.
        launch: the launch's id, which its attempt's record names.
        reason: why it ended.
        now: seconds since the epoch.
        done_step: the last step that was done, whether it has a line or not, if that is known.

    Returns:
        The attempt, if the launch had come so far as to make one.

    Raises:
        OSError: the record can't be written.
        RunDirectoryError: it was damaged.
    """
    facts = _attempt_of(save, launch)
    if facts is None or facts.stop is not None:
        return facts
    step, chain = facts.begin.step, facts.begin.chain
    lines = attempt_lines_path(save, facts.number)
    if lines.exists():
        with lines.open("rb") as file:
            os.fsync(file.fileno())  # what is noted of them must not outlive them
        end = read_end(lines)
        step = step if end.step is None else end.step.step
        chain = end.chain or chain
    stop = Stop(
        reason=reason,
        time=now,
        step=step,
        chain=chain,
        done_step=None if done_step is None else max(done_step, step),
    )
    closed = replace(facts, stop=stop)
    write_attempt_facts(save, closed)
    return closed


def _attempt_of(save: Path, launch: str) -> AttemptFacts | None:
    for number in range(next_attempt_number(save) - 1, 0, -1):
        facts = read_attempt_facts(save, number)
        if facts is not None and facts.environment.get(LAUNCH) == launch:
            return facts
        if facts is not None and LAUNCH in facts.environment:
            return None  # another launch's came later; ours made none
    return None
