"""Runs a job whose nodes are all this machine: ``run_job.py JOB_FILE NAME:SLOTS... SCRIPT``.

Real agents, each in a process of its own, joined to a real head. In pdsh's place a shell starts
them; ``$AGENTS`` says how, with {head}, {file} and {node}.
"""

import os
import shlex
import sys
from pathlib import Path

from megatron.base.errors import MegatronError
from megatron.base.exit_codes import CANNOT_LAUNCH
from megatron.engine.launch.agent import GraceTimes
from megatron.engine.launch.head import run_job
from megatron.engine.launch.job_file import JobSecrets, write_job_file
from megatron.engine.launch.job_nodes import Job
from megatron.engine.launch.multi_node import connect_time
from megatron.engine.launch.remote_start import RemoteStart
from megatron.engine.launch.travelling import travelling_environment

AGENT = f"{shlex.quote(sys.executable)} -u -m megatron.cli.node_agent --head {{head}} "
AGENT += "--job-file {file} --node {node}"


def main() -> int:
    *hosts, script = sys.argv[1:]
    secrets = JobSecrets.new(os.environ)
    file = write_job_file(secrets, Path.cwd())
    environment, _ = travelling_environment(
        os.environ, home="/nowhere", working_directory=Path.cwd()
    )
    slots = {name: list(range(int(count))) for name, count in (host.split(":") for host in hosts)}
    job = Job(slots, script, ("argument",), environment, os.getcwd(), secrets.token)

    def start(port: int) -> RemoteStart:
        line = os.environ.get("AGENTS", AGENT)
        names = {"head": f"127.0.0.1:{port}", "file": file}
        commands = [f"{line.format(**names, node=name)} &" for name in slots]
        shell = "\n".join([*commands, "wait"])
        return RemoteStart(("/bin/sh", "-c", shell), dict(os.environ))

    end = run_job(
        job,
        start,
        grace=GraceTimes(settle_s=0.8, terminate_s=0.4),
        connect_s=connect_time(os.environ),
        all_are_here=lambda: file.unlink(),
    )
    return 130 if end is None else end.status


if __name__ == "__main__":
    try:
        status = main()
    except MegatronError as error:
        sys.stderr.write(f"deepy: {error}\n")
        status = error.exit_code or CANNOT_LAUNCH
    sys.exit(status)
