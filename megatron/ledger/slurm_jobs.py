"""What SLURM says of jobs: whether one, as often as it was requeued, has ended; when it will end.

Only a clear answer counts. Where SLURM isn't there, doesn't answer in time or is of another
cluster, nothing is known.
"""

import datetime
import logging
import math
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

__all__ = ["SlurmJob", "end_of_job"]

logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
# States no process of the job can be in anymore; COMPLETING and SUSPENDED are not among them.
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}


@dataclass(frozen=True)
class SlurmJob:
    """A job between two requeues."""

    cluster: str | None
    job_id: str
    restart_count: int

    @classmethod
    def of_environment(cls, environ: Mapping[str, str]) -> Self | None:
        """Return the job this process is part of; None outside of SLURM.

        Example:
            >>> SlurmJob.of_environment({"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "big"})
            SlurmJob(cluster='big', job_id='7', restart_count=0)
        """
        job_id = environ.get("SLURM_JOB_ID", "")
        restarts = environ.get("SLURM_RESTART_COUNT", "0")
        if not (job_id.isdecimal() and restarts.isdecimal()):
            return None
        return cls(environ.get("SLURM_CLUSTER_NAME"), job_id, int(restarts))

    def is_over(self, asker: "SlurmJob | None") -> bool:
        """Whether SLURM is certain that the job has ended, or was requeued since.

        Args:
            asker: the job that wants to know; None: this machine may belong to any cluster.
        """
        if asker is None or asker.cluster != self.cluster:
            return False
        if asker.job_id == self.job_id:
            return asker.restart_count > self.restart_count
        described = _run("scontrol", "show", "job", "-o", self.job_id)
        if described is not None:
            fields = dict(word.partition("=")[::2] for word in described.split())
            restarts = fields.get("Restarts", "")
            return fields.get("JobState") in _ENDED or (
                restarts.isdecimal() and int(restarts) > self.restart_count
            )
        # The controller forgets a job minutes after its end, the accounting doesn't.
        states = _run("sacct", "-n", "-X", "-P", "-o", "State", "-j", self.job_id)
        lines = states.split("\n") if states else []
        return any(lines) and all(line.split()[0] in _ENDED for line in lines if line.strip())


def end_of_job(environ: Mapping[str, str]) -> float | None:
    """Return when the job of this process will be at its time limit, in seconds since the epoch.

    ``squeue`` is asked first, for a limit can be changed; where it gives no answer, what SLURM told
    the job at its start is taken. Infinite without a limit; None outside of SLURM, or if nothing
    tells.
    """
    job = SlurmJob.of_environment(environ)
    if job is None:
        return None
    told = environ.get("SLURM_JOB_END_TIME", "")
    answer = _run("squeue", "-h", "-j", job.job_id, "-o", "%e")
    if answer:
        try:
            return datetime.datetime.fromisoformat(answer).timestamp()  # local time, as SLURM's
        except ValueError:
            return math.inf  # "N/A", "NONE": without a limit
    return float(told) if told.isdecimal() else None


def _run(*command: str) -> str | None:
    """Return what a command printed; None if it isn't there, fails or takes too long."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env={**os.environ, "SLURM_TIME_FORMAT": "standard"},
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError) as error:
        logger.debug("%s gave no answer: %s", command[0], error)
        return None
    return result.stdout.strip() if result.returncode == 0 else None
