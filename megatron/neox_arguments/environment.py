"""This process's rank, as NeoX reads it from the environment."""

import os
from collections.abc import MutableMapping

from megatron.base.errors import ConfigError
from megatron.config.slurm import slurm_rank_variables

__all__ = ["configure_ranks"]


def configure_ranks(
    *, uses_slurm: bool, uses_mpi: bool, environ: MutableMapping[str, str] = os.environ
) -> dict[str, int]:
    """Return ``local_rank``, ``rank`` and ``world_size``; a process on its own is rank 0 of 1.

    Under SLURM its variables are copied to the names torch.distributed reads, as NeoX does.

    Raises:
        ConfigError: under MPI, or if SLURM's variables are missing.
    """
    if uses_mpi:
        raise ConfigError(
            "known to NeoX, not supported here yet: deepspeed_mpi=True "
            "(set RANK, LOCAL_RANK and WORLD_SIZE instead)"
        )
    if uses_slurm:
        environ.update(slurm_rank_variables(environ))
    return {
        "local_rank": int(environ.get("LOCAL_RANK", "0")),
        "rank": int(environ.get("RANK", "0")),
        "world_size": int(environ.get("WORLD_SIZE", "1")),
    }
