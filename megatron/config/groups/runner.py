"""Keys for the launcher: which hosts and slots, and how they are reached."""

from dataclasses import dataclass
from typing import Literal

from megatron.config.declare import WORKS, key, refused

__all__ = ["DeepspeedRunner"]


@dataclass(frozen=True, kw_only=True)
class DeepspeedRunner:
    """Where the ranks run and what starts them."""

    hostfile: str | None = key(None, outcome=WORKS)
    """Host file with one ``host slots=N`` per line. Unset: ``$DLTS_HOSTFILE``, else
    ``/job/hostfile``, if there is such a file. A missing file means this machine alone."""

    include: str | None = key(None, outcome=WORKS)
    """Hosts and slots to use, as ``host1@host2:0,2``. Unset: all. Excludes ``exclude``."""

    exclude: str | None = key(None, outcome=WORKS)
    """Hosts and slots to leave alone, as ``host1@host2:0,2``. Unset: none."""

    num_nodes: int | None = key(-1, unit="hosts", minimum=-1, outcome=WORKS)
    """Use the first so many hosts of the host file; -1 uses all."""

    num_gpus: int | None = key(None, unit="ranks per host", minimum=-1, outcome=WORKS)
    """Slots to use on every host. Unset: all a host has. On a machine without GPUs, the number of
    processes to start."""

    master_port: int | None = key(29500, minimum=0, maximum=65535, outcome=WORKS)
    """TCP port at which the ranks find each other."""

    master_addr: str | None = key(None, outcome=WORKS)
    """Address at which the ranks find each other; ``$MASTER_ADDR`` wins over it. Unset: that of the
    first host."""

    launcher: Literal["pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm"] | None = key(
        "pdsh", outcome=WORKS
    )
    """What starts the ranks' agents on several hosts. One host alone is started without it unless
    ``force_multi`` is set. ``slurm``: the hosts are those of the SLURM job around ``deepy.py``, if
    there is no host file."""

    force_multi: bool | None = key(False, tier=2, outcome=WORKS)
    """Use ``launcher`` for one host too. On by itself with ``deepspeed_slurm`` and
    ``deepspeed_mpi``."""

    autotuning_run: str | None = key(
        None, tier=3, outcome=refused("drop --autotuning and set the batch sizes by hand")
    )
    """Mode of DeepSpeed's autotuner, ``tune`` or ``run``; deepy.py's ``--autotuning``."""

    no_ssh_check: bool | None = key(False, tier=2, outcome=WORKS)
    """Don't try to reach every host with ssh before launching."""

    comment: str | None = key(None, tier=2, outcome=WORKS)
    """Comment put on the SLURM job step (``launcher: slurm``)."""

    account: str | None = key(None, tier=2, outcome=WORKS)
    """Account the SLURM job step is charged to (``launcher: slurm``)."""
