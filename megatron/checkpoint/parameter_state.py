"""Weights' fp32 masters and Adam's moments of any checkpoint, by parameter and tensor rank.

One form for every writer: any tensor-, pipeline- and data-parallel size, ZeRO 0, 1 and 2, fp32,
bf16 and fp16, ours and NeoX's. Nothing is read before it is asked for; files are mapped.

    states = open_parameter_states(StoredCheckpoint(path), settings)
    states.part(2, "mlp.linear1.weight", "exp_avg", size=4, rank=3)   # tensor rank 3 of 4
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, overload

import torch

from megatron.base.errors import CheckpointError
from megatron.checkpoint.compatibility import WEIGHTS_ALONE
from megatron.checkpoint.flat_partitions import (
    KINDS,
    FlatState,
    Kind,
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
    StoredParameter,
    derived_layouts,
    named_layout,
    parameter_key,
    sliced_names,
)
from megatron.checkpoint.weights import rank_part, stored_shape
from megatron.model.settings import ModelSettings

__all__ = [
    "LossScale",
    "ParameterStates",
    "StoredGroup",
    "gradient_multiple_notice",
    "gradient_multiple_of",
    "open_parameter_states",
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


class ParameterStates:
    """The optimizer state of one checkpoint; see the module's example.

    Attributes:
        step: Adam steps taken; fp16 steps that overflowed don't count.
        groups: parameter groups over all stages.
        scaler: state of the dynamic loss scaler, None if the writer had none.
        gradient_multiple: the writer's moments were those of gradients so many times ours;
            :meth:`part` has divided it out.
        weight_dtype: of the stored weights.
        metadata: content of the first model-states file: scheduler, counters, arguments.
    """

    def __init__(
        self,
        stored: StoredCheckpoint,
        settings: ModelSettings,
        layouts: Sequence[StageLayout],
        reader: OptimizerReader,
        *,
        step: int,
        groups: tuple[StoredGroup, ...],
        scaler: LossScale | None,
        gradient_multiple: int,
    ) -> None:
        self.stored = stored
        self.step = step
        self.groups = groups
        self.scaler = scaler
        self.gradient_multiple = gradient_multiple
        self._settings = settings
        self._reader = reader
        self._places: dict[ParameterKey, StoredParameter] = {}
        for layout in layouts:
            for key, place in layout.items():
                self._places.setdefault(key, place)  # the first of two stages that share a layer
        self.names = tuple(sorted(self._places, key=lambda key: key[0]))

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.stored.model_states(self.stored.model_ranks[0])

    @cached_property
    def weight_dtype(self) -> torch.dtype:
        layer, name = self.names[0]
        return self.stored.weights(layer, 0)[1][name].dtype

    @property
    def tensor_parallel_size(self) -> int:
        """The writer's."""
        return self.stored.tensor_parallel_size

    @property
    def has_moments(self) -> bool:
        """False if it was saved before a first step; moments are zeros then."""
        return self.step > 0

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should know."""
        if self.gradient_multiple == 1:
            return ()
        return (gradient_multiple_notice(self.gradient_multiple),)

    def part(self, layer: int, name: str, kind: Kind, *, size: int, rank: int) -> torch.Tensor:
        """Return what tensor rank ``rank`` of ``size`` holds, in fp32.

        Of a vocabulary that ``size`` doesn't divide the last ranks hold rows of zeros. The result
        is a view of a mapped file where that is possible: clone what outlives the checkpoint.

        Args:
            layer: NeoX's number.
            name: within the layer.
            kind: the master, or one of the moments.
            size: tensor-parallel size of the reader; the model's heads and widths must divide.
            rank: the reader.

        Raises:
            CheckpointError: a file is missing, damaged or of another save.
            KeyError: there is no such parameter.
        """
        part = self._rank_part(name, partial(self._stored, (layer, name), kind), size, rank).float()
        if kind == "master" or self.gradient_multiple == 1:
            return part
        return part / self.gradient_multiple ** (1 if kind == "exp_avg" else 2)

    def require(self, layer: int, name: str, *, size: int, rank: int) -> torch.Size:
        """Return the shape of what :meth:`part` gives, having opened all it needs.

        No values are read.

        Raises:
            CheckpointError, KeyError: as :meth:`part`.
        """
        return self._rank_part(name, partial(self._opened, (layer, name)), size, rank).shape

    def _rank_part(
        self, name: str, read: Callable[[int], torch.Tensor], size: int, rank: int
    ) -> torch.Tensor:
        parts = _Parts(self.tensor_parallel_size, read)
        return rank_part(name, parts, size=size, rank=rank, settings=self._settings)

    def _stored(self, key: ParameterKey, kind: Kind, tensor_rank: int) -> torch.Tensor:
        place = self._places[key]
        pieces = self._reader.pieces(key, place, tensor_rank, kind)
        if not pieces:
            return torch.zeros(place.shape)
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return flat.view(place.shape)

    def _opened(self, key: ParameterKey, tensor_rank: int) -> torch.Tensor:
        place = self._places[key]
        for kind in KINDS:
            self._reader.pieces(key, place, tensor_rank, kind)
        return torch.empty(place.shape, device="meta")


class _Parts(Sequence[torch.Tensor]):
    """All tensor ranks' parts of a parameter, each read when it is asked for."""

    def __init__(self, num_parts: int, read: Callable[[int], torch.Tensor]) -> None:
        self._num_parts = num_parts
        self._read = read

    def __len__(self) -> int:
        return self._num_parts

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        if isinstance(index, slice):
            return [self._read(each) for each in range(*index.indices(self._num_parts))]
        if not 0 <= index < self._num_parts:
            raise IndexError(index)
        return self._read(index)


def open_parameter_states(stored: StoredCheckpoint, settings: ModelSettings) -> ParameterStates:
    """Return the optimizer state of a checkpoint; metadata is read, no values are.

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
        CheckpointError: it is a NeoX pipeline's, and nothing says how many micro steps it took;
            or NeoX v1.0 wrote it.
    """
    if stored.is_ours:
        return 1
    if ds_config is None:
        raise CheckpointError(
            f"{stored.directory} was written by NeoX v1.0, whose optimizer state cannot be read "
            f"yet; {WEIGHTS_ALONE}"
        )
    return stored.gradient_accumulation_steps(ds_config) if stored.has_layer_files else 1


def _require_readable(stored: StoredCheckpoint) -> None:
    if not stored.model_ranks:
        raise CheckpointError(f"{stored.directory} holds weights alone; {WEIGHTS_ALONE}")
    if stored.is_scattered:
        raise CheckpointError(
            f"{stored.directory} was written by ZeRO stage 3, whose state can be resumed at "
            "its own topology and ZeRO stage only"
        )


def _open_partitioned(stored: StoredCheckpoint, settings: ModelSettings) -> ParameterStates:
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
    _require_shapes(stored, layouts, settings)
    optimizers = [partition(stage, 0, 0).optimizer for stage in range(stored.num_stages)]
    step = adam_steps(optimizers[0])
    return ParameterStates(
        stored,
        settings,
        layouts,
        FlatState(partition, step),
        step=step,
        groups=_groups(optimizers, layouts),
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


def _open_replicated(stored: StoredCheckpoint, settings: ModelSettings) -> ParameterStates:
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
    _require_shapes(stored, layouts, settings)
    step = adam_steps(optimizers[0])
    ds_config = stored.model_states(stored.model_ranks[0]).get("ds_config")
    return ParameterStates(
        stored,
        settings,
        layouts,
        FlatState(flat, step) if is_flat else WholeState(whole, weight, step),
        step=step,
        groups=_groups(optimizers, layouts),
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


def _require_shapes(
    stored: StoredCheckpoint, layouts: Sequence[StageLayout], settings: ModelSettings
) -> None:
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


def _groups(
    optimizers: Sequence[Mapping[str, Any]], layouts: Sequence[StageLayout]
) -> tuple[StoredGroup, ...]:
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
