"""Launches over several nodes, through DeepSpeed's runner in this process."""

import subprocess
import types
from collections.abc import Sequence
from typing import Any

from megatron.base.errors import LaunchError

__all__ = ["run_deepspeed"]


def run_deepspeed(arguments: Sequence[str]) -> int:
    """Run DeepSpeed's launcher with ``arguments`` and return the exit status of what it started.

    DeepSpeed itself returns as if all were well when its pdsh, srun or mpirun is ended by a signal;
    here that is 128 + the signal.

    Raises:
        LaunchError: DeepSpeed can't launch: the backend isn't installed, a host can't be reached.
    """
    from deepspeed.launcher import runner  # takes seconds to import

    started: list[subprocess.Popen[Any]] = []

    class RecordedPopen(subprocess.Popen[Any]):
        def __init__(self, *positional: Any, **named: Any) -> None:
            super().__init__(*positional, **named)
            started.append(self)

    runner.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": RecordedPopen})
    try:
        runner.main(list(arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        # DeepSpeed raises anything from AssertionError to CalledProcessError.
        raise LaunchError(f"DeepSpeed's launcher: {error or type(error).__name__}") from error
    finally:
        runner.subprocess = subprocess
    ended_by = [-process.returncode for process in started if (process.returncode or 0) < 0]
    return 128 + ended_by[0] if ended_by else 0
