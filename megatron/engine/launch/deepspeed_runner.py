"""Launches over several nodes, through DeepSpeed's runner in this process."""

import shlex
import subprocess
import types
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.base.errors import LaunchError
from megatron.config.groups import DeepspeedRunner

__all__ = ["run_deepspeed", "runner_arguments"]


def runner_arguments(
    runner: DeepspeedRunner,
    *,
    hostfile: str | None,
    is_slurm: bool,
    environ: Mapping[str, str],
) -> list[str]:
    """Return DeepSpeed's launcher options for the launcher's keys.

    As in NeoX, ``$MASTER_ADDR`` wins over its key and a filter makes ``num_gpus`` void. Comment
    and account go to SLURM, for which DeepSpeed has no options of its own.
    """
    is_filtered = bool(runner.include or runner.exclude)
    options = {
        "hostfile": hostfile,
        "include": runner.include,
        "exclude": runner.exclude,
        "num_nodes": _positive(runner.num_nodes),
        "num_gpus": None if is_filtered else _positive(runner.num_gpus),
        "master_port": runner.master_port,
        "master_addr": environ.get("MASTER_ADDR") or runner.master_addr,
        "launcher": runner.launcher,
    }
    arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
    if runner.force_multi or is_slurm:
        arguments.append("--force_multi")
    if runner.no_ssh_check:
        arguments.append("--no_ssh_check")
    slurm_options = []
    for name in ("comment", "account"):
        if value := getattr(runner, name):
            slurm_options += [f"--{name}", value]
    if slurm_options and runner.launcher == "slurm":
        arguments.append(f"--launcher_args={shlex.join(slurm_options)}")
    return arguments


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


def _positive(number: int | None) -> int | None:
    return number if number is not None and number > 0 else None
