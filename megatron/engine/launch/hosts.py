"""Which slots of which hosts a job runs on, and whether they are as many as it has ranks."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.base.errors import LaunchError
from megatron.config.groups import DeepspeedRunner
from megatron.config.hostfile import list_hosts, select_hosts
from megatron.engine.launch.devices import count_devices, local_slots

__all__ = ["Hosts", "choose_hosts", "is_this_machine"]

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Hosts:
    """Where the ranks go."""

    slots: dict[str, list[int]]  # by host; ranks count through them in this order
    hostfile: str | None  # the file they are from, if there is one
    is_allocation: bool = False  # they are those of the SLURM job we are in

    @property
    def num_ranks(self) -> int:
        """Ranks on all hosts together."""
        return sum(map(len, self.slots.values()))


def choose_hosts(
    runner: DeepspeedRunner,
    *,
    world_size: int,
    environ: Mapping[str, str],
    uses_slurm: bool | None = False,
) -> Hosts:
    """Return where ``world_size`` ranks go, as the launcher's keys say.

    Args:
        runner: the launcher's keys.
        world_size: the number of ranks.
        environ: the launcher's environment.
        uses_slurm: the key ``deepspeed_slurm``; as ``launcher: slurm`` it takes the hosts of the
            SLURM job around us, if there is no host file.

    Raises:
        ConfigError: the host file is no good, or the keys ask for hosts or slots it doesn't have.
        LaunchError: the slots are not as many as there are ranks, or more than this machine's GPUs.
    """
    found = list_hosts(
        runner.hostfile,
        num_gpus=runner.num_gpus,
        uses_slurm=bool(uses_slurm) or runner.launcher == "slurm",
        local_slots=lambda: local_slots(environ),
        environ=environ,
    )
    path, listed, source = found.hostfile, found.slots, found.source
    is_this_machine_alone = path is None and not found.is_allocation
    if is_this_machine_alone:
        if uses_slurm:
            raise LaunchError(
                "deepspeed_slurm is set, but this is no SLURM job (no $SLURM_JOB_NODELIST) and "
                "there is no hostfile; start deepy.py from a batch script or from salloc"
            )
        # Without GPUs a slot is a process, and the configuration may ask for any number.
        wanted = runner.num_gpus if runner.num_gpus and runner.num_gpus > 0 else world_size
        listed, source = {"localhost": wanted}, "this machine"
    slots = select_hosts(
        listed,
        include=runner.include,
        exclude=runner.exclude,
        num_nodes=runner.num_nodes if len(listed) > 1 else None,
        num_gpus=runner.num_gpus,
    )
    hosts = Hosts(
        slots,
        hostfile=None if path is None else str(path),
        is_allocation=found.is_allocation,
    )
    if hosts.num_ranks != world_size:
        raise LaunchError(
            f"the configuration is for {world_size} ranks (global_num_gpus), but {source} gives "
            f"{hosts.num_ranks} slots: "
            + ", ".join(f"{host} {len(numbers)}" for host, numbers in slots.items())
            + "; leave global_num_gpus out to have it counted, or change the slots"
        )
    if len(slots) == 1 and not found.is_allocation:
        _require_devices(next(iter(slots.values())), source, environ)
    return hosts


def is_this_machine(host: str) -> bool:
    """Whether ``host`` is a name of the machine we run on, as far as that can be told cheaply."""
    own = socket.gethostname()
    return host in _THIS_MACHINE or host.partition(".")[0] == own.partition(".")[0]


def _require_devices(slots: list[int], source: str, environ: Mapping[str, str]) -> None:
    devices = count_devices(environ)
    if 0 < devices <= max(slots):
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        detail = f" with CUDA_VISIBLE_DEVICES={visible}" if visible is not None else ""
        raise LaunchError(
            f"slot {max(slots)} is asked for ({source}, {len(slots)} ranks), but this machine has "
            f"{devices} GPUs{detail}: more ranks than slots. Lower num_gpus, or set "
            "DS_ACCELERATOR=cpu to run without GPUs"
        )
