"""The state of DeepSpeed's optimizers: ZeRO's, the bf16 one, the fp16 ones, and the plain one."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.base.errors import CheckpointError
from megatron.checkpoint.compatibility import WEIGHTS_ALONE, LoadSettings
from megatron.checkpoint.optimizer_state import adapt_optimizer_state

__all__ = ["adapt_engine_state", "is_partitioned", "load_engine_state", "require_matching_masters"]

# What the two partitioned optimizers of DeepSpeed (ZeRO and BF16) have in common.
_NEEDED_OF_ZERO = {"base_optimizer_state", "single_partition_of_fp32_groups", "ds_version"}


def is_partitioned(engine: Any) -> bool:
    """Whether each data-parallel rank has a file with its part of the optimizer state.

    That is so for ZeRO, and for the bf16 optimizer at any stage.
    """
    return hasattr(engine.optimizer, "dp_process_group")


def adapt_engine_state(
    engine: Any, state: Mapping[str, Any], *, gradient_multiple: int, source: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a stored optimizer state as ``engine.optimizer`` loads it, and notices for the user.

    Args:
        engine: DeepSpeed's.
        state: as DeepSpeed's optimizer saved it, with that of torch's inside.
        gradient_multiple: the writer's moments are those of gradients this many times ours.
        source: the file, for messages.

    Raises:
        CheckpointError: it belongs to another kind of optimizer, or to other parameters.
    """
    live = engine.optimizer
    is_plain = live is engine.basic_optimizer
    inner = "base_optimizer_state" if is_partitioned(engine) else "optimizer_state_dict"
    needed = {"param_groups"} if is_plain else set(live.state_dict())
    if is_partitioned(engine):
        needed = _NEEDED_OF_ZERO
    if missing := sorted(needed - set(state)):
        raise CheckpointError(
            f"{source} lacks {', '.join(missing)}: it was written with another precision, ZeRO "
            f"stage or optimizer; {WEIGHTS_ALONE}"
        )
    adapted = adapt_optimizer_state(
        state if is_plain else state[inner],
        engine.basic_optimizer.param_groups,
        gradient_multiple=gradient_multiple,
        source=source,
    )
    if is_plain:
        return adapted.state, adapted.notices
    result = {**state, inner: adapted.state}
    if "clip_grad" in state:
        # NeoX stores 0 for its default of 1.0; DeepSpeed would take that over.
        result["clip_grad"] = live.clip_grad
    if "loss_scaler" in state:
        # Scalers of older DeepSpeed versions lack attributes that this one's methods use.
        scaler = state["loss_scaler"]
        vars(scaler).update({**vars(live.loss_scaler), **vars(scaler)})
    return result, adapted.notices


def load_engine_state(engine: Any, state: dict[str, Any], settings: LoadSettings) -> None:
    """Load what :func:`adapt_engine_state` returned."""
    if not is_partitioned(engine):
        engine.optimizer.load_state_dict(state)
        return
    place = settings.topology.coordinates(settings.rank)
    states: list[dict[str, Any] | None] = [None] * settings.topology.data_parallel_size
    states[place.data_parallel_rank] = state
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints a debugging line
        engine.optimizer.load_state_dict(
            states, load_optimizer_states=True, load_from_fp32_weights=True
        )


def require_matching_masters(engine: Any, directory: Path) -> None:
    """Check that the loaded weights are the optimizer's fp32 copies, rounded.

    Raises:
        CheckpointError: they are not, so that the files come from different saves.
    """
    for weights, masters in _weights_and_masters(engine.optimizer):
        rounded = masters.detach().to(device=weights.device, dtype=weights.dtype)
        if not torch.allclose(rounded, weights.detach(), rtol=0, atol=0, equal_nan=True):
            raise CheckpointError(
                f"{directory}: weights and the optimizer's copies of them differ, so its layer "
                "files and optimizer files come from different saves; load another checkpoint, or "
                f"{WEIGHTS_ALONE}"
            )


def _weights_and_masters(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the weights and fp32 copies that this rank updates; fp32 without ZeRO has no copies."""
    if hasattr(optimizer, "parallel_partitioned_bit16_groups"):  # ZeRO 1 and 2
        weights, masters = (
            optimizer.parallel_partitioned_bit16_groups,
            optimizer.single_partition_of_fp32_groups,
        )
    elif hasattr(optimizer, "bf16_partitioned_groups"):
        weights, masters = optimizer.bf16_partitioned_groups, optimizer.fp32_groups_flat_partition
    elif hasattr(optimizer, "fp32_groups_flat"):  # fp16 with NVIDIA's fused optimizer
        yield from zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True)
        return
    elif hasattr(optimizer, "fp32_groups"):  # fp16 with torch's
        for halves, fulls in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(halves, fulls, strict=True)
        return
    else:
        return
    groups = optimizer.real_dp_process_group
    for partitions, master, group in zip(weights, masters, groups, strict=True):
        yield partitions[torch.distributed.get_rank(group=group)], master
