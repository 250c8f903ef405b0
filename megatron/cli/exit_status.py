"""How a command of ours ends: no status 0 after a failure, no traceback for a user's slip."""

import os
import sys
from collections.abc import Callable

from megatron.base.errors import MegatronError

__all__ = ["run_command"]


def run_command(command: Callable[[], None]) -> int:
    """Run ``command`` and return the process's exit status.

    An error of ours is a message for the user, printed without a traceback: what, the numbers,
    where, what next. Anything else is a defect and keeps its traceback.
    """
    try:
        command()
    except MegatronError as error:
        print(_describe(error), file=sys.stderr, flush=True)  # noqa: T201 - the message
        return 1
    return 0


def _describe(error: MegatronError) -> str:
    rank = os.environ.get("RANK")
    where = f"rank {rank}: " if rank is not None else ""
    return f"{where}{type(error).__name__}: {error}"
