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
    # ZeRO's optimizers, and the bf16 one, which keeps its state in files of its own at any stage.
    return hasattr(engine.optimizer, "dp_process_group")


def adapt_engine_state(
    engine: Any, state: Mapping[str, Any], *, gradient_multiple: int, source: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Adapt the state of a DeepSpeed optimizer, and of the torch optimizer inside it."""
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
    """Check that the weights are the optimizer's fp32 copies, rounded: both are of one save."""
    for weights, masters in _weights_and_masters(engine.optimizer):
        rounded = masters.detach().to(device=weights.device, dtype=weights.dtype)
        if not torch.equal(rounded, weights.detach()):
            raise CheckpointError(
                f"{directory}: weights and the optimizer's copies of them differ, so its layer "
                "files and optimizer files come from different saves; load another checkpoint, or "
                f"{WEIGHTS_ALONE}"
            )


def _weights_and_masters(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if hasattr(optimizer, "parallel_partitioned_bit16_groups"):  # ZeRO 1 and 2
        groups = zip(
            optimizer.parallel_partitioned_bit16_groups,
            optimizer.single_partition_of_fp32_groups,
            optimizer.real_dp_process_group,
            strict=True,
        )
    elif hasattr(optimizer, "bf16_partitioned_groups"):
        groups = zip(
            optimizer.bf16_partitioned_groups,
            optimizer.fp32_groups_flat_partition,
            optimizer.real_dp_process_group,
            strict=True,
        )
    else:  # without ZeRO: fp16 with and without flat copies; fp32 has none
        for name in ("groups_flat", "groups"):
            if hasattr(optimizer, f"fp16_{name}") and hasattr(optimizer, f"fp32_{name}"):
                halves, fulls = (
                    getattr(optimizer, f"fp16_{name}"),
                    getattr(optimizer, f"fp32_{name}"),
                )
                for half, full in zip(halves, fulls, strict=True):
                    yield from (
                        [(half, full)] if torch.is_tensor(half) else zip(half, full, strict=True)
                    )
                return
        return
    for partitions, masters, group in groups:
        yield partitions[torch.distributed.get_rank(group=group)], masters
