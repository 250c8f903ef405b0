"""How the checkpoint tools end: an error of ours is a message and a status, never a traceback."""

import os
import sys
from collections.abc import Callable

from megatron.base.errors import MegatronError
from megatron.base.printing import printable
from megatron.cli.ledger.output import note

__all__ = ["CANNOT_TELL", "run_tool"]

CANNOT_TELL = 2


def run_tool(name: str, tool: Callable[[], int]) -> int:
    """Run a tool and return its exit status; 2 if it could not tell what was asked."""
    try:
        return tool()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MegatronError, OSError) as error:
        note(f"{name}: {printable(str(error))}")
        return CANNOT_TELL
    except KeyboardInterrupt:
        return 130
