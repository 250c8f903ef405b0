"""The state of DeepSpeed's optimizers: ZeRO's, the bf16 one, the fp16 ones, and the plain one."""

import contextlib
import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.base.errors import CheckpointError
from megatron.checkpoint.compatibility import WEIGHTS_ALONE, LoadSettings, model_rank
from megatron.checkpoint.live_optimizer import live_masters
from megatron.checkpoint.optimizer_state import adapt_optimizer_state
from megatron.checkpoint.stored import StoredCheckpoint, zero_file
from megatron.checkpoint.weights import numbered_layers, unused_copies

__all__ = [
    "adapt_engine_state",
    "is_partitioned",
    "layout_difference",
    "load_engine_state",
    "require_matching_masters",
    "require_rounded",
    "zero_file_of",
]

# What the two partitioned optimizers of DeepSpeed (ZeRO and BF16) have in common.
_NEEDED_OF_ZERO = {"base_optimizer_state", "single_partition_of_fp32_groups", "ds_version"}


def is_partitioned(engine: Any) -> bool:
    """Whether each data-parallel rank has a file with its part of the optimizer state.

    That is so for ZeRO, and for the bf16 optimizer at any stage.
    """
    return hasattr(engine.optimizer, "dp_process_group")


def layout_difference(
    engine: Any, stored: StoredCheckpoint, metadata: Mapping[str, Any], settings: LoadSettings
) -> str | None:
    """Return how the stored optimizer state differs in form from this rank's, None if it doesn't.

    Args:
        engine: DeepSpeed's.
        stored: a checkpoint of the same topology.
        metadata: content of this rank's model-states file.
        settings: what is expected of it.
    """
    if stored.is_v1:
        return "NeoX v1.0 wrote it"
    layer, module = next(iter(numbered_layers(engine.module).items()))
    name, parameter = next(iter(module.named_parameters()))
    weight = stored.weights(layer, settings.tensor_rank)[1].get(name)
    if weight is not None and weight.dtype != parameter.dtype:
        return f"it holds {weight.dtype} weights, this run trains {parameter.dtype}"
    if is_partitioned(engine) != bool(stored.optimizer_files):
        return "it was written with another ZeRO stage"
    if not is_partitioned(engine):
        return _replicated_difference(engine, metadata.get("optimizer"))
    state = stored.optimizer_states(zero_file_of(engine, settings)).get("optimizer_state_dict")
    if not isinstance(state, Mapping) or "param_slice_mappings" not in state:
        return None
    if state["param_slice_mappings"] != engine.optimizer._param_slice_mappings:
        return "its parameters are divided over stages, groups or ranks in another way"
    return None


def zero_file_of(engine: Any, settings: LoadSettings) -> str:
    """Return the name of the file with this rank's part of the optimizer state."""
    place = settings.topology.coordinates(settings.rank)
    return zero_file(place.data_parallel_rank, model_rank(settings), bf16=engine.bfloat16_enabled())


def _replicated_difference(engine: Any, state: Any) -> str | None:
    live = engine.optimizer
    if not isinstance(state, Mapping):
        return None
    is_plain = live is engine.basic_optimizer
    if ("param_groups" in state) != is_plain or not (
        is_plain or set(live.state_dict()) <= set(state)
    ):
        return "it was written with another precision or optimizer"
    groups = state.get("optimizer_state_dict", state)["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(group["params"]) for group in engine.basic_optimizer.param_groups]:
        return "its parameters are divided over stages or groups in another way"
    return None


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
    unused = unused_copies(engine.module)
    for master in itertools.chain.from_iterable(live_masters(engine)):
        values = master.tensor.detach().view(-1)
        for fragment in master.fragments:
            if id(fragment.parameter) in unused:
                continue
            weights = fragment.parameter.detach().view(-1)
            require_rounded(
                values[fragment.offset : fragment.offset + fragment.size],
                weights[fragment.start : fragment.start + fragment.size],
                directory=directory,
            )


def require_rounded(masters: torch.Tensor, weights: torch.Tensor, *, directory: Path) -> None:
    """Check that ``weights`` are ``masters`` in their own precision.

    Raises:
        CheckpointError: they are not, so that files of ``directory`` come from different saves.
    """
    rounded = masters.to(device=weights.device, dtype=weights.dtype)
    if not torch.allclose(rounded, weights, rtol=0, atol=0, equal_nan=True):
        raise CheckpointError(
            f"{directory}: weights and the optimizer's copies of them differ, so its layer files "
            "and optimizer files come from different saves; load another checkpoint, or "
            f"{WEIGHTS_ALONE}"
        )
