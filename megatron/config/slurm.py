"""What SLURM says in environment variables: which hosts a job has, which rank a process is."""

import re
from collections.abc import Callable, Mapping

from megatron.base.errors import ConfigError

__all__ = ["allocated_hosts", "expand_node_list", "slurm_rank_variables"]

_BRACKETS = re.compile(r"(?P<head>[^\[\]]*)\[(?P<ranges>[^\[\]]*)\](?P<rest>.*)")
_TASKS = re.compile(r"(?P<tasks>\d+)(?:\(x(?P<times>\d+)\))?")


def allocated_hosts(
    environ: Mapping[str, str], *, slots: int | None, local_slots: Callable[[], int]
) -> dict[str, int] | None:
    """Return the slots of every host of this job's allocation; None outside of one.

    As many slots as a host has GPUs for the job; where SLURM knows of no GPUs, the tasks per node
    that were asked for; else this machine's devices, or SLURM's number of tasks.

    Args:
        environ: where SLURM's variables are.
        slots: of every host, if the user says so.
        local_slots: answers how many devices this machine has.
    """
    nodes = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not nodes:
        return None
    hosts = expand_node_list(nodes)
    return dict(zip(hosts, _slots_of(len(hosts), environ, slots, local_slots), strict=True))


def expand_node_list(text: str) -> list[str]:
    """Return the host names in SLURM's short form of them.

    Example:
        >>> expand_node_list("node[08-10,12],login")
        ['node08', 'node09', 'node10', 'node12', 'login']
    """
    # commas between brackets separate ranges, others hosts
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    return [host for part in parts for host in _expand(part)]


def slurm_rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``LOCAL_RANK``, ``RANK`` and ``WORLD_SIZE`` from a job step's variables.

    Raises:
        ConfigError: the process is not part of a SLURM job step.
    """
    missing = [name for name in ("SLURM_LOCALID", "SLURM_PROCID") if name not in environ]
    if "SLURM_NTASKS" in environ:
        tasks = environ["SLURM_NTASKS"]
    elif "SLURM_NNODES" in environ and "SLURM_NTASKS_PER_NODE" in environ:
        tasks = str(int(environ["SLURM_NNODES"]) * int(environ["SLURM_NTASKS_PER_NODE"]))
    else:
        missing.append("SLURM_NTASKS")
    if missing:
        raise ConfigError(
            f"deepspeed_slurm is set, but {', '.join(missing)} is not in the environment; "
            "start the ranks with srun"
        )
    return {
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
    }


def _slots_of(
    num_hosts: int, environ: Mapping[str, str], slots: int | None, local_slots: Callable[[], int]
) -> list[int]:
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if environ.get("DS_ACCELERATOR") == "cpu" or not gpus.isdecimal():
        gpus = "0"
    per_node = environ.get("SLURM_NTASKS_PER_NODE", "")
    if slots is not None and slots > 0:
        return [slots] * num_hosts
    if int(gpus):
        return [int(gpus)] * num_hosts
    if per_node.isdecimal() and int(per_node):
        return [int(per_node)] * num_hosts
    if (devices := local_slots()) > 1:
        return [devices] * num_hosts
    tasks = environ.get("SLURM_TASKS_PER_NODE", "")
    found = [match for part in tasks.split(",") if (match := _TASKS.fullmatch(part.strip()))]
    counts = [int(match["tasks"]) for match in found for _ in range(int(match["times"] or 1))]
    return counts if len(counts) == num_hosts else [1] * num_hosts


def _expand(part: str) -> list[str]:
    match = _BRACKETS.fullmatch(part)
    if match is None:
        return [part]
    middles = []
    for piece in match["ranges"].split(","):
        first, dash, last = piece.partition("-")
        if not dash:
            middles.append(piece)
            continue
        numbers = range(int(first), int(last) + 1)
        middles += [str(number).zfill(len(first)) for number in numbers]
    rests = _expand(match["rest"]) if match["rest"] else [""]
    return [match["head"] + middle + rest for middle in middles for rest in rests]
