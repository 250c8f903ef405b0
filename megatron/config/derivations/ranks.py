"""How many ranks there are, and how they are divided."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron.base.errors import ConfigError
from megatron.config.derivations.elastic import nearest_rank_counts
from megatron.config.draft import Draft, reads

__all__ = ["parallelism_derivation"]


def parallelism_derivation(
    local_slots: Callable[[], int], environ: Mapping[str, str]
) -> Callable[[Draft], dict[str, Any]]:
    """Return the derivation that counts the ranks and divides them.

    It is the one that may look at the machine: ``local_slots`` answers how many devices there are,
    ``environ`` names the default host file, or the hosts of a SLURM job.
    """

    @reads(
        "global_num_gpus",
        "hostfile",
        "include",
        "exclude",
        "num_nodes",
        "num_gpus",
        "launcher",
        "deepspeed_slurm",
        "pipe_parallel_size",
        "model_parallel_size",
    )
    def derive_parallelism(draft: Draft) -> dict[str, Any]:
        if draft["global_num_gpus"] is not None:
            return _divide(draft, draft["global_num_gpus"], draft.say("global_num_gpus"))
        ranks, source = _count_slots(draft, local_slots, environ)
        return _divide(draft, ranks, source)

    return derive_parallelism


def _divide(draft: Draft, ranks: int, source: str) -> dict[str, Any]:
    """Divide ``ranks``, whose number comes from ``source``.

    Raises:
        ConfigError: they are too few, or can't be divided evenly.
    """
    model_parallel_size = max(1, draft["model_parallel_size"] or 1)
    pipe_parallel_size = draft["pipe_parallel_size"] or 0
    replica = max(1, pipe_parallel_size) * model_parallel_size
    product = f"{draft.say('pipe_parallel_size')} x {draft.say('model_parallel_size')}"
    if replica > ranks:
        raise ConfigError(
            f"{product} needs {replica} ranks, more than the {ranks} slots there are ({source}); "
            "lower one of them, or raise num_gpus or the hostfile's slots"
        )
    if ranks % replica:
        nearest = " or ".join(map(str, _nearest(draft, ranks, replica)))
        raise ConfigError(
            f"{ranks} ranks ({source}) can't be divided by {product} = {replica}: the "
            f"data-parallel size must be a whole number; nearest: {nearest} ranks"
        )
    return {
        "global_num_gpus": ranks,
        "model_parallel_size": model_parallel_size,
        "pipe_parallel_size": pipe_parallel_size,
        "is_pipe_parallel": pipe_parallel_size >= 1,
    }


def _nearest(draft: Draft, ranks: int, replica: int) -> tuple[int, ...]:
    """Return the nearest numbers of ranks that work."""
    total = draft["train_batch_size"]
    if draft["elastic_batch"] and isinstance(total, int):
        return nearest_rank_counts(total, ranks, ranks_per_replica=replica)
    below = ranks // replica * replica
    return below, below + replica


def _count_slots(
    draft: Draft, local_slots: Callable[[], int], environ: Mapping[str, str]
) -> tuple[int, str]:
    """Return the number of ranks and where that number comes from."""
    # the launcher's file, which needs nothing else of the configuration
    from megatron.config.hostfile import list_hosts, select_hosts

    num_gpus = draft["num_gpus"]
    listed = list_hosts(
        draft["hostfile"],
        num_gpus=num_gpus,
        uses_slurm=draft["launcher"] == "slurm" or bool(draft["deepspeed_slurm"]),
        local_slots=local_slots,
        environ=environ,
    )
    hosts = listed.slots
    if min(hosts.values()) < 1:
        raise ConfigError(
            "this machine has no device to run on; set num_gpus to the number of processes"
        )
    num_nodes = draft["num_nodes"] if len(hosts) > 1 else None
    selected = select_hosts(
        hosts,
        include=draft["include"],
        exclude=draft["exclude"],
        num_nodes=num_nodes,
        num_gpus=num_gpus,
    )
    is_key = listed.hostfile is None and not listed.is_allocation and (num_gpus or 0) > 0
    return sum(map(len, selected.values())), draft.say("num_gpus") if is_key else listed.source
