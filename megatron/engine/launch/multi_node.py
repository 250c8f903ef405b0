"""A launch on several nodes: what has to be ready before agents start, and what is left after."""

import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron.base.errors import ConfigError, LaunchError
from megatron.base.exit_codes import NODE_LOST
from megatron.engine.launch.addresses import own_addresses
from megatron.engine.launch.agent import GraceTimes
from megatron.engine.launch.conclusion import JobEnd
from megatron.engine.launch.head import run_job
from megatron.engine.launch.job_channel import CONNECT_S
from megatron.engine.launch.job_file import TOKEN_VARIABLE, JobSecrets, write_job_file
from megatron.engine.launch.job_nodes import Job
from megatron.engine.launch.remote_start import SSH_OPTIONS, RemoteStart, remote_start

__all__ = ["CONNECT_VARIABLE", "connect_time", "launch_on_hosts"]

CONNECT_VARIABLE = "DEEPY_CONNECT_S"
_SSH_LIMIT_S = 20.0


def launch_on_hosts(
    job: Job,
    secrets: JobSecrets,
    *,
    launcher: str,
    launcher_args: Sequence[str],
    environ: Mapping[str, str],
    grace: GraceTimes,
    checks_ssh: bool,
) -> JobEnd | None:
    """Start an agent on every host of ``job`` and return how the job ended.

    Returns:
        None if a signal stopped the launch before a rank was started.

    Raises:
        LaunchError: a host can't be reached, or can't take part.
    """
    hosts = list(job.hosts)
    connect_s = connect_time(environ)
    with ExitStack() as stack:
        job_file = write_job_file(secrets, job.working_directory)
        stack.callback(job_file.unlink, missing_ok=True)
        if checks_ssh and _goes_by_ssh(launcher, environ):
            _reach(hosts, job_file, secrets)

        def start(port: int) -> RemoteStart:
            head = f"{','.join(own_addresses(hosts))}:{port}"
            return remote_start(
                launcher,
                hosts,
                ["--head", head, "--job-file", str(job_file)],
                environ=environ,
                exported={
                    **job.environment,
                    **secrets.environment,
                    TOKEN_VARIABLE: secrets.token,
                },
                launcher_args=launcher_args,
                working_directory=job.working_directory,
            )

        return run_job(
            job,
            start,
            grace=grace,
            connect_s=connect_s,
            all_are_here=lambda: job_file.unlink(missing_ok=True),
        )


def connect_time(environ: Mapping[str, str]) -> float:
    """Return how long agents may take to come.

    Raises:
        ConfigError: ``$DEEPY_CONNECT_S`` is not a number of seconds.
    """
    text = environ.get(CONNECT_VARIABLE)
    try:
        seconds = CONNECT_S if text is None else float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 < seconds < 1e6:
        raise ConfigError(f"${CONNECT_VARIABLE}={text!r} is not a number of seconds above 0")
    return seconds


def _goes_by_ssh(launcher: str, environ: Mapping[str, str]) -> bool:
    # mpirun starts its processes through srun in a SLURM job, and by any other program on request.
    has_other = "SLURM_JOB_ID" in environ or "OMPI_MCA_plm_rsh_agent" in environ
    return launcher == "pdsh" or (launcher != "slurm" and not has_other)


def _reach(hosts: Sequence[str], job_file: Path, secrets: JobSecrets) -> None:
    """Try every host with ssh, and see to it that it has the job file.

    Raises:
        LaunchError: hosts that can't be reached, or have no such directory, are named.
    """
    folder, file = shlex.quote(str(job_file.parent)), shlex.quote(str(job_file))
    # Where the directory isn't shared, the file is brought; stdin is seen by nobody.
    command = f"cd {folder} && {{ test -r {file} || (umask 077; cat > {file}); }}"
    asked = {}
    for host in hosts:
        asked[host] = subprocess.Popen(
            ["ssh", *SSH_OPTIONS, host, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    deadline = time.monotonic() + _SSH_LIMIT_S
    problems = []
    for host, process in asked.items():
        try:
            _, words = process.communicate(
                secrets.as_bytes(), timeout=max(0.1, deadline - time.monotonic())
            )
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            problems.append(f"{host} (no answer in {_SSH_LIMIT_S:.0f} s)")
            continue
        if process.returncode:
            reason = words.decode(errors="replace").strip().replace("\n", "; ")
            problems.append(f"{host} ({reason or f'status {process.returncode}'})")
    if problems:
        error = LaunchError(
            f"{len(problems)} of {len(hosts)} hosts can't be used: {', '.join(problems)}; try "
            "`ssh HOST` without a password, correct the hostfile, or leave hosts out with exclude"
        )
        if "SLURM_JOB_ID" in os.environ:
            error.exit_code = NODE_LOST  # the next try may get other nodes
        raise error
