"""The command that starts one node agent per host: pdsh, srun or mpirun.

The commands have DeepSpeed's form; importing its builders would cost seconds before anything
starts, and they start ranks, not agents (decision 0008).
"""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.base.errors import LaunchError
from megatron.engine.launch.job_file import TOKEN_VARIABLE

__all__ = ["SSH_OPTIONS", "RemoteStart", "remote_start"]

_PACKAGE_ROOT = Path(__file__).parents[3]
_PDSH_FAN_OUT = 1024  # DeepSpeed's
# A dead node has to be noticed, and nobody is there to type a password.
SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=6"),
)
_MPI_PROGRAMS = {
    "openmpi": ("mpirun.openmpi", "mpirun"),
    "mpich": ("mpiexec.hydra", "mpirun.mpich", "mpirun"),
    "impi": ("mpiexec.hydra", "mpirun"),
    "mvapich": ("mpirun",),
}
# SLURM's options of a job, by which srun would start something else than one agent per node.
_SRUN_READS = (
    *("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
    *("SLURM_NTASKS_PER_GPU", "SLURM_NTASKS_PER_SOCKET", "SLURM_NTASKS_PER_CORE"),
    *("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_CPUS_PER_GPU", "SLURM_GPUS_PER_TASK"),
    *("SLURM_GPU_BIND", "SLURM_CPU_BIND", "SLURM_DISTRIBUTION", "SLURM_EXACT", "SLURM_HINT"),
    *("SLURM_KILL_BAD_EXIT", "SLURM_WAIT", "SLURM_LABELIO", "SLURM_MEM_PER_CPU"),
)


@dataclass(frozen=True)
class RemoteStart:
    """A program to run here, which starts the agents."""

    command: tuple[str, ...]
    environment: dict[str, str]

    @property
    def program(self) -> str:
        """Its name."""
        return os.path.basename(self.command[0])


def remote_start(
    launcher: str,
    hosts: Sequence[str],
    agent_options: Sequence[str],
    *,
    environ: Mapping[str, str],
    exported: Mapping[str, str],
    launcher_args: Sequence[str] = (),
    working_directory: str,
) -> RemoteStart:
    """Return the command by which ``launcher`` starts one agent on each of ``hosts``.

    Args:
        launcher: pdsh, openmpi, mpich, impi, mvapich or slurm.
        hosts: by the names the user gave.
        agent_options: the agent's command line; how it gets its host's name is added.
        environ: the launcher's own environment.
        exported: variables for the agents, for launchers that hand the environment on: not through
            a command line.
        launcher_args: further options of the program.
        working_directory: where the agents start.

    Raises:
        LaunchError: the program isn't installed.
    """
    python_path = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), environ.get("PYTHONPATH")]))
    agent = [sys.executable, "-u", "-m", "megatron.cli.node_agent", *agent_options]
    environment = {**environ, **exported, "PYTHONPATH": python_path}
    if launcher == "pdsh":
        environment.pop(TOKEN_VARIABLE, None)  # ssh carries no environment
        return _pdsh(hosts, agent, environment, python_path, launcher_args, working_directory)
    if launcher == "slurm":
        return _srun(hosts, agent, environment, launcher_args, working_directory)
    program = _find(launcher, *_MPI_PROGRAMS[launcher])
    names = sorted({*exported, "PYTHONPATH", TOKEN_VARIABLE})
    if launcher == "openmpi":
        command = _openmpi(program, hosts, names, launcher_args, working_directory)
    else:
        command = _hydra(program, hosts, names, launcher_args, working_directory)
    return RemoteStart((*command, *agent), environment)


def _pdsh(
    hosts: Sequence[str],
    agent: Sequence[str],
    environment: dict[str, str],
    python_path: str,
    launcher_args: Sequence[str],
    working_directory: str,
) -> RemoteStart:
    environment["PDSH_RCMD_TYPE"] = "ssh"
    options = [environment.get("PDSH_SSH_ARGS_APPEND", ""), *SSH_OPTIONS]
    environment["PDSH_SSH_ARGS_APPEND"] = " ".join(filter(None, options))
    script = (
        f"cd {shlex.quote(working_directory)} && "
        f"PYTHONPATH={shlex.quote(python_path)} exec {shlex.join(agent)}"
    ).replace("%", "%%")  # pdsh replaces %h by the host
    command = [_find("pdsh", "pdsh"), "-S", "-N", "-R", "ssh", "-f", str(_PDSH_FAN_OUT)]
    command += ["-w", ",".join(hosts), *launcher_args, f"{script} --node %h"]
    return RemoteStart(tuple(command), environment)


def _srun(
    hosts: Sequence[str],
    agent: Sequence[str],
    environment: dict[str, str],
    launcher_args: Sequence[str],
    working_directory: str,
) -> RemoteStart:
    command = [_find("slurm", "srun"), f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}"]
    command += ["--ntasks-per-node=1", f"--nodelist={','.join(hosts)}", "--export=ALL"]
    # An agent has the whole node; its ranks share it. It outlives the failure of another one, for
    # the launcher to tell in order what happened.
    command += ["--cpu-bind=none", "--mpi=none", "--kill-on-bad-exit=0", "--wait=0"]
    command.append(f"--chdir={working_directory}")
    if "SLURM_STEP_ID" in environment:  # we are in a step ourselves, and share its node
        command.append("--overlap")
    for name in _SRUN_READS:
        environment.pop(name, None)
    return RemoteStart((*command, *launcher_args, *agent), environment)


def _openmpi(
    program: str,
    hosts: Sequence[str],
    names: Sequence[str],
    launcher_args: Sequence[str],
    working_directory: str,
) -> list[str]:
    command = [program, "-n", str(len(hosts)), "--host", ",".join(f"{host}:1" for host in hosts)]
    command += ["--map-by", "ppr:1:node", "--bind-to", "none", "-wdir", working_directory]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")  # containers have no other user
    for name in names:
        command += ["-x", name]
    return [*command, *launcher_args]


def _hydra(
    program: str,
    hosts: Sequence[str],
    names: Sequence[str],
    launcher_args: Sequence[str],
    working_directory: str,
) -> list[str]:
    command = [program, "-n", str(len(hosts)), "-ppn", "1", "-hosts", ",".join(hosts)]
    command += ["-genvlist", ",".join(names), "-wdir", working_directory]
    return [*command, *launcher_args]


def _find(launcher: str, *programs: str) -> str:
    for program in programs:
        if (path := shutil.which(program)) is not None:
            return path
    raise LaunchError(
        f"launcher {launcher!r} needs {' or '.join(programs)}, which is not installed here (not "
        "on $PATH); install it or choose another launcher"
    )
