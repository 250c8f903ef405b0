"""What SLURM's controller tells of the job that asks."""

import shutil
import subprocess
from collections.abc import Mapping
from datetime import datetime

__all__ = ["submit_time"]

_TIMEOUT_S = 20.0


def submit_time(environ: Mapping[str, str]) -> float | None:
    """Return when this job was submitted, or requeued last; None if nobody knows."""
    job = environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("squeue") is None:
        return None
    # Of an array, one task has the array's number: ask for the task.
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%V"],
            env={name: value for name, value in environ.items() if name != "SLURM_TIME_FORMAT"},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        ).stdout
        return datetime.fromisoformat(answer.split()[0]).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
