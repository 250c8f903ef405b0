"""SLURM's answer to which rank a process is."""

from collections.abc import Mapping

from megatron.base.errors import ConfigError

__all__ = ["slurm_rank_variables"]


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
