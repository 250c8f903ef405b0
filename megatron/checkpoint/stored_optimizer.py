"""Opening the optimizer state of a checkpoint, in whichever files its writer left it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron.base.errors import CheckpointError
from megatron.checkpoint.compatibility import WEIGHTS_ALONE
from megatron.checkpoint.flat_partitions import (
    FlatState,
    OptimizerReader,
    Partition,
    WholeOptimizer,
    WholeState,
    adam_steps,
)
from megatron.checkpoint.stored import StoredCheckpoint, model_states_file, zero_file
from megatron.checkpoint.stored_layout import (
    ParameterKey,
    StageLayout,
    StageSize,
    derived_layouts,
    named_layout,
    parameter_key,
    sliced_names,
)
from megatron.checkpoint.weights import stored_shape
from megatron.model.settings import ModelSettings

__all__ = [
    "LossScale",
    "StoredGroup",
    "StoredOptimizer",
    "gradient_multiple_notice",
    "gradient_multiple_of",
    "groups_of",
    "open_stored_optimizer",
    "require_shapes",
]

_OPTIONS = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class StoredGroup:
    """A parameter group of the writer's optimizer, over all stages."""

    name: str  # weight_decay_params, or no_weight_decay_params
    options: Mapping[str, Any]  # lr, betas, eps, weight_decay
    keys: tuple[ParameterKey, ...]


@dataclass(frozen=True)
class LossScale:
    """What a dynamic loss scaler has come to."""

    scale: float
    iteration: int  # steps counted, those that overflowed too
    last_overflow_iteration: int  # -1: none yet
    hysteresis: int | None = None  # overflows left before the scale falls; None: not stored


@dataclass(frozen=True)
class StoredOptimizer:
    """What a checkpoint's files say of the optimizer; its values are read through ``reader``."""

    layouts: Sequence[StageLayout]  # of each pipeline stage
    reader: OptimizerReader
    step: int  # Adam steps taken; fp16 steps that overflowed don't count
    groups: tuple[StoredGroup, ...]
    scaler: LossScale | None  # None: the writer had no dynamic loss scale
    gradient_multiple: int  # the moments are those of gradients so many times ours


def open_stored_optimizer(stored: StoredCheckpoint, settings: ModelSettings) -> StoredOptimizer:
    """Return the optimizer of a checkpoint; metadata is read, no values are.

    Args:
        stored: the checkpoint, ours or NeoX's.
        settings: the model, with the checkpoint's pinned vocabulary.

    Raises:
        CheckpointError: it holds no optimizer state, or one that cannot be read.
    """
    _require_readable(stored)
    if stored.optimizer_files:
        return _open_partitioned(stored, settings)
    return _open_replicated(stored, settings)


def gradient_multiple_notice(multiple: int) -> str:
    """Return what a user is told about a NeoX pipeline's moments."""
    return (
        "NeoX's pipeline sums gradients over the micro steps where we average: the optimizer's "
        f"exp_avg is divided by {multiple}, exp_avg_sq by {multiple**2}"
    )


def gradient_multiple_of(stored: StoredCheckpoint, ds_config: Mapping[str, Any] | None) -> int:
    """Return how many times ours the gradients were that the stored moments are of.

    Args:
        stored: the checkpoint.
        ds_config: DeepSpeed's configuration, as stored beside the optimizer state.

    Raises:
        CheckpointError: it is a NeoX pipeline's, and nothing says how many micro steps it took.
    """
    if stored.is_ours or stored.is_v1:
        return 1
    return stored.gradient_accumulation_steps(ds_config) if stored.has_layer_files else 1


def _require_readable(stored: StoredCheckpoint) -> None:
    if not stored.model_ranks:
        raise CheckpointError(f"{stored.directory} holds weights alone; {WEIGHTS_ALONE}")
    if stored.is_scattered:
        raise CheckpointError(
            f"{stored.directory} was written by ZeRO stage 3, whose state can be resumed at "
            "its own topology and ZeRO stage only"
        )


def _open_partitioned(stored: StoredCheckpoint, settings: ModelSettings) -> StoredOptimizer:
    """Open what ZeRO 1 and 2 and the bf16 optimizer write: a file for each rank."""
    tensor = stored.tensor_parallel_size
    is_bf16 = any(name.startswith("bf16") for name in stored.optimizer_files.values())

    def content(stage: int, tensor_rank: int, data_rank: int) -> tuple[dict[str, Any], str]:
        name = zero_file(data_rank, stage * tensor + tensor_rank, bf16=is_bf16)
        return stored.optimizer_states(name), str(stored.directory / name)

    def partition(stage: int, tensor_rank: int, data_rank: int) -> Partition:
        file, source = content(stage, tensor_rank, data_rank)
        return Partition.of_zero(_zero_state(file, source), source)

    first, source = content(0, 0, 0)
    multiple = gradient_multiple_of(stored, first.get("ds_config"))
    state = _zero_state(first, source)
    layouts = [_partitioned_layout(stored, stage, content) for stage in range(stored.num_stages)]
    require_shapes(stored, layouts, settings)
    optimizers = [partition(stage, 0, 0).optimizer for stage in range(stored.num_stages)]
    step = adam_steps(optimizers[0])
    return StoredOptimizer(
        layouts=layouts,
        reader=FlatState(partition, step),
        step=step,
        groups=groups_of(optimizers, layouts),
        scaler=_scaler(state),
        gradient_multiple=multiple,
    )


def _zero_state(content: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    state = content.get("optimizer_state_dict")
    needed = {"base_optimizer_state", "single_partition_of_fp32_groups", "group_paddings"}
    if not isinstance(state, Mapping) or (missing := needed - set(state)):
        lacking = ", ".join(sorted(missing)) if isinstance(state, Mapping) else "its state"
        raise CheckpointError(f"{source} lacks {lacking}: no ZeRO optimizer wrote it")
    if not isinstance(state["base_optimizer_state"], Mapping):
        raise CheckpointError(
            f"{source} holds optimizer state of an elastic or older ZeRO format, which cannot be "
            f"read yet; {WEIGHTS_ALONE}"
        )
    return state


def _partitioned_layout(stored: StoredCheckpoint, stage: int, content: Any) -> StageLayout:
    model_rank = stage * stored.tensor_parallel_size
    metadata = stored.model_states(model_rank)
    state = _zero_state(*content(stage, 0, 0))
    shapes = metadata.get("param_shapes")
    if shapes is not None:
        return named_layout(shapes, stage=stage, paddings=state.get("param_alignment_paddings"))
    num_ranks = metadata.get("dp_world_size") or 1
    names = sliced_names(
        _zero_state(*content(stage, 0, data_rank))["param_slice_mappings"]
        for data_rank in range(num_ranks)
    )
    return named_layout(
        [{name: _weight_shape(stored, name) for name in group} for group in names], stage=stage
    )


def _open_replicated(stored: StoredCheckpoint, settings: ModelSettings) -> StoredOptimizer:
    """Open what is in model-states files: the plain optimizer, or DeepSpeed's fp16 ones."""
    tensor = stored.tensor_parallel_size

    def content(stage: int, tensor_rank: int) -> tuple[Mapping[str, Any], str]:
        name = model_states_file(stage * tensor + tensor_rank)
        state = stored.model_states(stage * tensor + tensor_rank).get("optimizer")
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"{stored.directory / name} holds no optimizer state, and there are no "
                f"*zero_pp_rank_*_optim_states.pt either; {WEIGHTS_ALONE}"
            )
        return state, str(stored.directory / name)

    def whole(stage: int, tensor_rank: int) -> WholeOptimizer:
        state, source = content(stage, tensor_rank)
        masters = state.get("fp32_groups")
        if masters is not None:
            masters = [master for group in masters for master in group]
        return WholeOptimizer(source, _inner_optimizer(state, source), masters)

    def flat(stage: int, tensor_rank: int, data_rank: int) -> Partition:
        state, source = content(stage, tensor_rank)
        masters = state["fp32_groups_flat"]
        lengths = [master.numel() for master in masters]
        return Partition(source, masters, _inner_optimizer(state, source), lengths)

    def weight(key: ParameterKey, tensor_rank: int) -> torch.Tensor:
        return stored.weights(key[0], tensor_rank)[1][key[1]]

    is_flat = "fp32_groups_flat" in content(0, 0)[0]
    optimizers = [_inner_optimizer(*content(stage, 0)) for stage in range(stored.num_stages)]
    sizes = [
        StageSize(
            num_groups=len(optimizer["param_groups"]),
            total=sum(flat(stage, 0, 0).lengths)
            if is_flat
            else sum(len(group["params"]) for group in optimizer["param_groups"]),
            is_in_elements=is_flat,
        )
        for stage, optimizer in enumerate(optimizers)
    ]
    layouts = derived_layouts(stored, settings, sizes)
    require_shapes(stored, layouts, settings)
    step = adam_steps(optimizers[0])
    ds_config = stored.model_states(stored.model_ranks[0]).get("ds_config")
    return StoredOptimizer(
        layouts=layouts,
        reader=FlatState(flat, step) if is_flat else WholeState(whole, weight, step),
        step=step,
        groups=groups_of(optimizers, layouts),
        scaler=_scaler(content(0, 0)[0]),
        gradient_multiple=gradient_multiple_of(stored, ds_config),
    )


def _inner_optimizer(state: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    optimizer = state.get("optimizer_state_dict", state)
    if not isinstance(optimizer, Mapping) or "param_groups" not in optimizer:
        raise CheckpointError(
            f"{source} holds optimizer state of an unknown kind ({', '.join(map(str, state))}); "
            f"{WEIGHTS_ALONE}"
        )
    return optimizer


def _weight_shape(stored: StoredCheckpoint, name: str) -> tuple[int, ...]:
    layer, tensor = parameter_key(name)
    path, tensors = stored.weights(layer, 0)
    if tensor not in tensors:
        raise CheckpointError(
            f"{path} lacks {tensor} of layer {layer}, whose optimizer state exists"
        )
    return tuple(tensors[tensor].shape)


def require_shapes(
    stored: StoredCheckpoint, layouts: Sequence[StageLayout], settings: ModelSettings
) -> None:
    """Check the shapes of all parameters against the model.

    Raises:
        CheckpointError: names the first that differs.
    """
    size = stored.tensor_parallel_size
    for layout in layouts:
        for (layer, name), place in layout.items():
            try:
                expected = stored_shape(name, place.shape, settings, size)
            except ValueError as error:
                raise CheckpointError(
                    f"{stored.directory} holds optimizer state of layer {layer}'s {name}: {error}"
                ) from error
            if place.shape != expected:
                raise CheckpointError(
                    f"{stored.directory} holds optimizer state of layer {layer}'s {name} with "
                    f"shape {place.shape} on each of {size} tensor ranks, but this model needs "
                    f"{expected}"
                )


def groups_of(
    optimizers: Sequence[Mapping[str, Any]], layouts: Sequence[StageLayout]
) -> tuple[StoredGroup, ...]:
    """Return the parameter groups over all stages.

    Args:
        optimizers: state_dict of each stage's optimizer; only ``param_groups`` is looked at.
        layouts: of each stage.
    """
    options: dict[str, dict[str, Any]] = {}
    keys: dict[str, dict[ParameterKey, None]] = {}
    for optimizer, layout in zip(optimizers, layouts, strict=True):
        for number, group in enumerate(optimizer["param_groups"]):
            decays = group.get("weight_decay") != 0.0
            name = group.get("name") or f"{'' if decays else 'no_'}weight_decay_params"
            options.setdefault(name, {key: group[key] for key in _OPTIONS if key in group})
            members = [key for key, place in layout.items() if place.group == number]
            keys.setdefault(name, {}).update(dict.fromkeys(members))
    return tuple(StoredGroup(name, options[name], tuple(keys[name])) for name in options)


def _scaler(state: Mapping[str, Any]) -> LossScale | None:
    """Return the loss scale of ZeRO's scaler object, or of the fp16 optimizers' own entries."""
    values = vars(state["loss_scaler"]) if "loss_scaler" in state else state
    if not (values.get("dynamic") or values.get("dynamic_loss_scale")):
        return None
    return LossScale(
        scale=float(values["cur_scale"]),
        iteration=int(values["cur_iter"]),
        last_overflow_iteration=int(values["last_overflow_iter"]),
        hysteresis=values.get("cur_hysteresis"),
    )
