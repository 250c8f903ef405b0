"""The three batch sizes: any of them can follow from the others."""

from typing import Any

from megatron.base.errors import ConfigError
from megatron.config.derivations.elastic import divide_batch, nearest_rank_counts
from megatron.config.draft import Draft, reads

__all__ = ["derive_batch"]

_TOTAL = "train_batch_size"
_MICRO = "train_micro_batch_size_per_gpu"
_ACCUMULATION = "gradient_accumulation_steps"


@reads(
    _TOTAL,
    _MICRO,
    _ACCUMULATION,
    "gradient_clipping",
    "global_num_gpus",
    "pipe_parallel_size",
    "model_parallel_size",
    "elastic_batch",
)
def derive_batch(draft: Draft) -> dict[str, Any]:
    """Complete the batch sizes so that total = micro x accumulation x data-parallel size.

    Under ``elastic_batch`` total is what is written, and micro at most what is written.

    Raises:
        ConfigError: nothing says how large a batch is, or the sizes contradict each other.
    """
    replica = max(1, draft["pipe_parallel_size"]) * draft["model_parallel_size"]
    data_parallel_size = draft["global_num_gpus"] // replica
    # "auto" is legal with DeepSpeed's autotuner, which finds the value
    total, micro, accumulation = (
        None if draft[name] == "auto" else draft[name] for name in (_TOTAL, _MICRO, _ACCUMULATION)
    )
    if draft["elastic_batch"]:
        total, micro, accumulation = _fit_elastic(draft, total, micro, replica)
    elif total is None and micro is None:
        raise ConfigError(
            f"how large is a batch? set {_MICRO} (samples per rank) or {_TOTAL} (samples per step)"
        )
    elif total is None:
        assert micro is not None  # noqa: S101 - one of the two is given
        accumulation = accumulation or 1
        total = micro * accumulation * data_parallel_size
    elif micro is not None:
        accumulation = _fit_accumulation(draft, total, micro, accumulation, data_parallel_size)
    else:
        accumulation = accumulation or 1
        micro = _fit_micro(draft, total, accumulation, data_parallel_size)
    return {
        _TOTAL: total,
        _MICRO: micro,
        _ACCUMULATION: accumulation,
        "batch_size": micro,
        "clip_grad": draft["gradient_clipping"],
    }


def _fit_accumulation(
    draft: Draft, total: int, micro: int, accumulation: int | None, data_parallel_size: int
) -> int:
    micro_step = micro * data_parallel_size
    if total % micro_step:
        raise ConfigError(
            f"{draft.say(_TOTAL)} must be a multiple of micro batch {micro} x data-parallel size "
            f"{data_parallel_size} = {micro_step}; {_nearest(total, micro_step)}"
            f"{_elastic_hint(total, data_parallel_size)}"
        )
    fitting = total // micro_step
    if accumulation is not None and accumulation != fitting:
        raise ConfigError(
            f"{draft.say(_TOTAL)} is not micro batch {micro} x {draft.say(_ACCUMULATION)} x "
            f"data-parallel size {data_parallel_size} = {micro_step * accumulation}; write "
            f"{_ACCUMULATION}: {fitting}, or null to have it worked out"
            f"{_elastic_hint(total, data_parallel_size)}"
        )
    return fitting


def _fit_micro(draft: Draft, total: int, accumulation: int, data_parallel_size: int) -> int:
    pieces = accumulation * data_parallel_size
    if total % pieces:
        raise ConfigError(
            f"{draft.say(_TOTAL)} must be a multiple of {_ACCUMULATION} {accumulation} x "
            f"data-parallel size {data_parallel_size} = {pieces}; {_nearest(total, pieces)}"
        )
    return total // pieces


def _fit_elastic(
    draft: Draft, total: int | None, micro: int | None, ranks_per_replica: int
) -> tuple[int, int, int]:
    ranks = draft["global_num_gpus"]
    data_parallel_size = ranks // ranks_per_replica
    if micro is None:
        raise ConfigError(
            f"elastic_batch needs {_MICRO}: how many samples a rank has room for; what is used is "
            f"at most that, so that {_TOTAL} is kept at any number of ranks"
        )
    if total is None:
        accumulation = draft[_ACCUMULATION] or 1
        accumulation = 1 if accumulation == "auto" else accumulation
        raise ConfigError(
            f"elastic_batch needs {_TOTAL}: how many samples a step takes, whatever the number of "
            f"ranks. Left to these {ranks} ranks it would be {micro} x {accumulation} x "
            f"{data_parallel_size} = {micro * accumulation * data_parallel_size}; of a run that "
            "goes on write what it began with"
        )
    divided = divide_batch(total, data_parallel_size, largest_micro_batch=micro)
    if divided is None:
        nearest = nearest_rank_counts(total, ranks, ranks_per_replica=ranks_per_replica)
        raise ConfigError(
            f"{draft.say(_TOTAL)} can't be shared out evenly over data-parallel size "
            f"{data_parallel_size} ({ranks} ranks); elastic_batch works with "
            f"{' or '.join(map(str, nearest))} ranks: take fewer with num_nodes, num_gpus, include "
            "or exclude, or more"
        )
    return total, *divided


def _elastic_hint(total: int, data_parallel_size: int) -> str:
    if total % data_parallel_size:
        return ""
    return f"; or elastic_batch: true, which keeps {total} and works out the others"


def _nearest(total: int, divisor: int) -> str:
    below = total // divisor * divisor
    candidates = [below, below + divisor] if below else [divisor]
    return "nearest: " + ", ".join(map(str, candidates))
