"""What ends a run before its last step: signals, time, and the loss of its directory."""

import math
import os
import time
from collections.abc import Mapping

from megatron.base.printing import print_rank_0
from megatron.base.processes import ProcessIdentity
from megatron.engine.distributed import ProcessGroups
from megatron.engine.saving import RunSaver
from megatron.engine.stop_signals import StopSignals
from megatron.engine.stopping import Cause, Stop, Stopping, signal_cause
from megatron.engine.time_limit import Deadline, SaveTimes, TimeLimit
from megatron.ledger.slurm_jobs import end_of_job

__all__ = ["open_stopping"]

_MINUTE_S = 60.0


def open_stopping(
    groups: ProcessGroups,
    saving: RunSaver | None,
    signals: StopSignals,
    *,
    exit_duration_in_mins: float | None,
    environ: Mapping[str, str] = os.environ,
) -> Stopping:
    """Return what tells this rank when to stop.

    Args:
        groups: of this rank.
        saving: writes checkpoints; None: the run isn't saved.
        signals: that ask this process to stop.
        exit_duration_in_mins: minutes that this launch may take.
        environ: tells of SLURM's job.
    """
    causes: list[Cause] = [signal_cause(signals, groups.rank)]
    if groups.rank == 0:
        began = _process_start()
        deadlines = _deadlines(began, exit_duration_in_mins, environ)
        if deadlines:
            causes.append(
                TimeLimit(
                    deadlines,
                    began=began,
                    saves=lambda: SaveTimes(None, False) if saving is None else saving.times,
                )
            )
            for deadline in deadlines:
                at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(deadline.at))
                print_rank_0(f"training saves and stops before {at}: {deadline.what}")
        if saving is not None:
            causes.append(lambda: _lost(saving))
    return Stopping(groups.store, causes)


def _deadlines(
    began: float, exit_duration_in_mins: float | None, environ: Mapping[str, str]
) -> list[Deadline]:
    deadlines = []
    if exit_duration_in_mins is not None:
        at = began + exit_duration_in_mins * _MINUTE_S
        deadlines.append(Deadline(at, f"exit_duration_in_mins: {exit_duration_in_mins:g}"))
    end = end_of_job(environ)
    if end is not None and math.isfinite(end):
        what = f"time limit of SLURM's job {environ['SLURM_JOB_ID']}"
        deadlines.append(Deadline(end, what, lambda: end_of_job(environ)))
    return deadlines


def _lost(saving: RunSaver) -> Stop | None:
    error = saving.why_lost()
    return None if error is None else Stop("save lost", error=error)


def _process_start() -> float:
    """Return when this process was started, in seconds since the epoch."""
    ticks = ProcessIdentity.of_this_process().start
    if ticks == 0:
        return time.time()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
