"""After a launch that was ended: its record is closed, and the user told what the next one does."""

import time
from pathlib import Path

from megatron.base.errors import MegatronError
from megatron.base.exit_codes import FINISHED, STOPPED
from megatron.engine.launch.conclusion import JobEnd
from megatron.ledger.attempt_facts import AttemptFacts
from megatron.ledger.dead_attempts import close_dead_attempt
from megatron.ledger.run_directory import read_latest

__all__ = ["note_end"]


def note_end(save: Path, launch: str, end: JobEnd) -> str | None:
    """Close the record of the launch's attempt, if its ranks couldn't; return what to tell.

    Args:
        save: the run directory.
        launch: the launch's id.
        end: how it ended; nothing of it runs any more.

    Returns:
        Where the same command goes on; None if the launch told that itself, or made no attempt.
    """
    if end.status in (FINISHED, STOPPED):
        return None
    try:
        attempt = close_dead_attempt(
            save, launch, reason=end.reason, now=time.time(), done_step=end.done_step
        )
        if attempt is None or attempt.stop is None:
            return None
        return _what_is_next(save, attempt, attempt.stop.done_step or attempt.stop.step)
    except (MegatronError, OSError) as error:
        return f"the end could not be noted in {save}: {error}"


def _what_is_next(save: Path, attempt: AttemptFacts, done_step: int) -> str:
    latest = read_latest(save)
    if latest is None:
        text, latest = "no checkpoint was saved; the same command begins again", attempt.begin.step
    else:
        text = f"the same command goes on from global_step{latest}"
    again = done_step - latest
    if again <= 0:
        return text
    steps = f"step {done_step}" if again == 1 else f"steps {latest + 1}..{done_step}"
    return f"{text}; {steps} will be done again, with the same samples"
