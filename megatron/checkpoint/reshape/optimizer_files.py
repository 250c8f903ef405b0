"""Optimizer state as DeepSpeed's optimizers at a new topology save it, read while it is written.

PLAIN     torch's AdamW, one state for each parameter; its masters are the weights themselves
UNFUSED   DeepSpeed's fp16 optimizer around it (also for bf16 without ZeRO and pipeline)
FUSED     DeepSpeed's fp16 optimizer around NVIDIA apex's: one flat vector for each group
ZERO      ZeRO 1 and 2: a file for each rank, with its part of every group's flat vector
BF16      the bf16 optimizer: likewise
"""

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.git_version_info import version as deepspeed_version
from deepspeed.utils.tensor_fragment import fragment_address

from megatron.base.errors import CheckpointError
from megatron.checkpoint.flat_partitions import Kind
from megatron.checkpoint.optimizer_state import with_fused_adam_keys
from megatron.checkpoint.parameter_state import ParameterStates, StoredGroup
from megatron.checkpoint.reshape.plan import FlatGroup, Stage, StageParameter
from megatron.checkpoint.reshape.streamed_file import StreamedTensor
from megatron.checkpoint.stored import StoredCheckpoint

__all__ = [
    "OptimizerFormat",
    "StateSlice",
    "StoredFormat",
    "parameter_shapes",
    "partitioned_state",
    "replicated_state",
    "stored_format",
]

_MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
# What a state says beside tensors, groups and names: scalers, limits, the stage.
_KEPT_OF_ZERO = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "zero_stage")
_KEPT_OF_FP16 = (
    "dynamic_loss_scale",
    "cur_scale",
    "cur_iter",
    "last_overflow_iter",
    "scale_factor",
    "scale_window",
    "clip_grad",
)


class OptimizerFormat(enum.Enum):
    """Which of DeepSpeed's optimizers wrote or will load a state."""

    PLAIN = enum.auto()
    UNFUSED = enum.auto()
    FUSED = enum.auto()
    ZERO = enum.auto()
    BF16 = enum.auto()

    @property
    def is_partitioned(self) -> bool:
        """Whether each data-parallel rank has a file of its own."""
        return self in (OptimizerFormat.ZERO, OptimizerFormat.BF16)


@dataclass(frozen=True)
class StoredFormat:
    """The format of a checkpoint, and what its state says beside tensors."""

    kind: OptimizerFormat
    head: Mapping[str, Any]  # scalers and limits
    options: Mapping[str, Any]  # of every parameter group, beside those that ParameterStates knows
    zero_stage: int
    ds_config: Mapping[str, Any] | None

    def at(self, *, uses_pipeline_engine: bool, is_bf16: bool, step: int) -> "StoredFormat":
        """Return the format at another topology; only bf16 without ZeRO depends on it."""
        if not is_bf16 or self.zero_stage > 0:
            return self
        if self.kind is OptimizerFormat.BF16 and not uses_pipeline_engine:
            head = {"dynamic_loss_scale": False, "cur_scale": 1.0, "cur_iter": step}
            return replace(self, kind=OptimizerFormat.UNFUSED, head=head)
        if self.kind is OptimizerFormat.UNFUSED and uses_pipeline_engine:
            clip = (self.ds_config or {}).get("gradient_clipping", 0.0)
            return replace(self, kind=OptimizerFormat.BF16, head={"clip_grad": clip})
        return self


def stored_format(stored: StoredCheckpoint) -> StoredFormat:
    """Return what a checkpoint's optimizer state was written by.

    Raises:
        CheckpointError: it holds none.
    """
    if stored.optimizer_files:
        content = stored.optimizer_states(stored.optimizer_files[min(stored.optimizer_files)])
        state = content["optimizer_state_dict"]
        kind = OptimizerFormat.ZERO if "zero_stage" in state else OptimizerFormat.BF16
        kept, ds_config = _KEPT_OF_ZERO, content.get("ds_config")
        optimizer = state["base_optimizer_state"]
    else:
        metadata = stored.model_states(stored.model_ranks[0])
        state, ds_config = metadata.get("optimizer"), metadata.get("ds_config")
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{stored.directory} holds no optimizer state")
        kind, kept = _replicated_kind(state), _KEPT_OF_FP16
        optimizer = state.get("optimizer_state_dict", state)
    head = {key: state[key] for key in kept if key in state}
    defaults = _adam_options()
    stored_options = optimizer["param_groups"][0]
    options = {key: stored_options.get(key, value) for key, value in defaults.items()}
    return StoredFormat(kind, head, options, _zero_stage(kind, head, ds_config), ds_config)


def _replicated_kind(state: Mapping[str, Any]) -> OptimizerFormat:
    if "fp32_groups_flat" in state:
        return OptimizerFormat.FUSED
    return OptimizerFormat.UNFUSED if "fp32_groups" in state else OptimizerFormat.PLAIN


def _zero_stage(
    kind: OptimizerFormat, head: Mapping[str, Any], ds_config: Mapping[str, Any] | None
) -> int:
    if kind is OptimizerFormat.ZERO:
        return int(head["zero_stage"])
    if kind is OptimizerFormat.BF16:
        return int(((ds_config or {}).get("zero_optimization") or {}).get("stage", 0))
    return 0


@dataclass(frozen=True)
class StateSlice:
    """What one tensor rank of a stage reads of a checkpoint's optimizer state."""

    states: ParameterStates
    stage: Stage
    size: int  # tensor-parallel size
    rank: int  # tensor rank
    after_read: Callable[[torch.Tensor], None]  # told every tensor once its bytes are written

    def groups(self) -> list[tuple[StoredGroup, tuple[StageParameter, ...]]]:
        """Return the groups with the stage's parameters in them; DeepSpeed drops empty ones."""
        found = []
        for group in self.states.groups:
            members = set(group.keys)
            chosen = tuple(
                parameter
                for parameter in self.stage.parameters
                if (parameter.layer, parameter.name) in members
            )
            if chosen:
                found.append((group, chosen))
        return found

    def whole(
        self, parameter: StageParameter, kind: Kind, *, is_leaf: bool = False
    ) -> StreamedTensor:
        """Return a parameter's value; ``is_leaf``: as a tensor that gradients are wanted for."""

        def pieces() -> Iterator[torch.Tensor]:
            part = self._part(parameter, kind)
            yield part
            self.after_read(part)

        return StreamedTensor(parameter.shape, torch.float32, pieces, requires_grad=is_leaf)

    def flat(
        self, group: FlatGroup, kind: Kind, data_rank: int, *, padding: int, is_leaf: bool = False
    ) -> StreamedTensor:
        """Return a data-parallel rank's part of a group's vector, then ``padding`` zeros."""
        fragments = list(group.fragments(data_rank))
        length = sum(fragment.num_elements for fragment in fragments) + padding

        def pieces() -> Iterator[torch.Tensor]:
            for fragment in fragments:
                part = self._part(fragment.parameter, kind)
                yield part.reshape(-1)[fragment.start : fragment.stop]
                self.after_read(part)
            yield torch.zeros(padding)

        return StreamedTensor((length,), torch.float32, pieces, requires_grad=is_leaf)

    def _part(self, parameter: StageParameter, kind: Kind) -> torch.Tensor:
        return self.states.part(
            parameter.layer, parameter.name, kind, size=self.size, rank=self.rank
        )


def partitioned_state(
    state: StateSlice, written: StoredFormat, *, num_partitions: int, data_rank: int
) -> dict[str, Any]:
    """Return ``optimizer_state_dict`` of a data-parallel rank's file (ZERO and BF16)."""
    is_zero = written.kind is OptimizerFormat.ZERO
    named = state.groups()
    flats = [FlatGroup(parameters, num_partitions) for _, parameters in named]
    is_last = data_rank == num_partitions - 1
    result = {
        **written.head,
        "base_optimizer_state": _optimizer_state(
            state,
            written,
            [
                (
                    group,
                    [
                        {
                            kind: state.flat(flat, kind, data_rank, padding=flat.padding(data_rank))
                            for kind in _MOMENTS
                        }
                    ],
                )
                for (group, _), flat in zip(named, flats, strict=True)
            ],
        ),
        # ZeRO cuts the padding off the masters, and off nothing else.
        "single_partition_of_fp32_groups": [
            state.flat(
                flat,
                "master",
                data_rank,
                padding=0 if is_zero else flat.padding(data_rank),
                is_leaf=True,
            )
            for flat in flats
        ],
        "group_paddings": [flat.padding(data_rank) if is_zero or is_last else 0 for flat in flats],
        "partition_count": [num_partitions for _ in flats],
        "ds_version": deepspeed_version,
        "param_slice_mappings": [
            OrderedDict(
                (
                    fragment.parameter.engine_name,
                    fragment_address(numel=fragment.num_elements, start=fragment.offset),
                )
                for fragment in flat.fragments(data_rank)
            )
            for flat in flats
        ],
    }
    if is_zero:
        result["param_alignment_paddings"] = [[0 for _ in flat.parameters] for flat in flats]
    return result


def replicated_state(state: StateSlice, written: StoredFormat) -> dict[str, Any]:
    """Return ``optimizer`` of a model-states file (PLAIN, UNFUSED and FUSED)."""
    named = state.groups()
    if written.kind is OptimizerFormat.FUSED:
        flats = [FlatGroup(parameters, 1) for _, parameters in named]
        inner = _optimizer_state(
            state,
            written,
            [
                (group, [{kind: state.flat(flat, kind, 0, padding=0) for kind in _MOMENTS}])
                for (group, _), flat in zip(named, flats, strict=True)
            ],
        )
        masters = [state.flat(flat, "master", 0, padding=0, is_leaf=True) for flat in flats]
        return {**written.head, "optimizer_state_dict": inner, "fp32_groups_flat": masters}
    inner = _optimizer_state(
        state,
        written,
        [
            (
                group,
                [
                    {kind: state.whole(parameter, kind) for kind in _MOMENTS}
                    for parameter in parameters
                ],
            )
            for group, parameters in named
        ],
    )
    if written.kind is OptimizerFormat.PLAIN:
        return inner
    masters = [
        [state.whole(parameter, "master", is_leaf=True) for parameter in parameters]
        for _, parameters in named
    ]
    return {**written.head, "optimizer_state_dict": inner, "fp32_groups": masters}


def parameter_shapes(state: StateSlice) -> list[OrderedDict[str, torch.Size]]:
    """Return ``param_shapes`` of a model-states file: names and shapes in flat order."""
    return [
        OrderedDict(
            (parameter.engine_name, torch.Size(parameter.shape)) for parameter in parameters
        )
        for _, parameters in state.groups()
    ]


def _optimizer_state(
    state: StateSlice,
    written: StoredFormat,
    groups: Sequence[tuple[StoredGroup, Sequence[Mapping[str, Any]]]],
) -> dict[str, Any]:
    """Return an optimizer's state_dict from the moments of every vector of every group."""
    step = state.states.step
    entries: dict[int, dict[str, Any]] = {}
    param_groups = []
    for group, vectors in groups:
        numbers = list(range(len(entries), len(entries) + len(vectors)))
        options = {**written.options, "name": group.name, **group.options}
        param_groups.append({**options, "params": numbers, "step": step})
        for number, moments in zip(numbers, vectors, strict=True):
            entries[number] = {"step": step, **moments}
    # An optimizer that has taken no step has no moments.
    kept = entries if state.states.has_moments else {}
    return with_fused_adam_keys({"state": kept, "param_groups": param_groups})


def _adam_options() -> dict[str, Any]:
    """Return what torch's AdamW keeps in a group beside the configured options."""
    group = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]
    return {key: value for key, value in group.items() if key != "params"}
