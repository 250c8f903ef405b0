"""How a command of ours ends: no status 0 after a failure, no traceback for a user's slip."""

import atexit
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from megatron.base.errors import MegatronError
from megatron.base.exit_codes import FAILED

__all__ = ["end_rank", "run_command", "run_rank"]

_TELLER_ENDS_FIRST_S = 2.0


def run_command(command: Callable[[], int | None]) -> int:
    """Run ``command`` and return the process's exit status: what it returns, or 0.

    An error of ours is a message for the user, printed without a traceback: what, the numbers,
    where, what next. What all ranks know is told by one of them, and that one ends first, so that
    launchers take its words for the cause. Anything else is a defect and keeps its traceback.
    """
    try:
        return command() or 0
    except MegatronError as error:
        if not _is_told_here(error):
            time.sleep(_TELLER_ENDS_FIRST_S)
        else:
            print(_describe(error), file=sys.stderr, flush=True)  # noqa: T201 - the message
        return FAILED if error.exit_code is None else error.exit_code


def run_rank(command: Callable[[], int | None]) -> NoReturn:
    """Run ``command`` as :func:`run_command` does, and end this rank with its status.

    A defect is printed and ends the rank at once too: torn down with its peers gone, a process
    whose traceback was out took up to 16 s more, and the next launch waits for it.
    """
    try:
        status = run_command(command)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001 - printed, as the interpreter would
        sys.excepthook(*sys.exc_info())
        status = FAILED
    end_rank(status)


def end_rank(status: int) -> NoReturn:
    """End a rank whose work is over, without taking the interpreter apart.

    Threads of torch's and gloo's live as long as anything holds a process group, which DeepSpeed's
    modules do to the end. One that lets go of a tensor while the interpreter shuts down aborts the
    process: seen once, status 134 after a training that was complete.
    """
    atexit._run_exitfuncs()  # of wandb and others
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_told_here(error: MegatronError) -> bool:
    rank = os.environ.get("RANK")
    return error.teller is None or rank is None or int(rank) == error.teller


def _describe(error: MegatronError) -> str:
    rank = os.environ.get("RANK")
    # a checkpoint's problem names the ranks that have it
    is_named = rank is None or str(error).startswith(("rank ", "ranks "))
    where = "" if is_named else f"rank {rank}: "
    return f"{where}{type(error).__name__}: {error}"
