"""Optimizer state as files hold it: flat vectors in parts, or one tensor per parameter.

Both kinds of file answer one question: where are the values of a parameter's master, exp_avg or
exp_avg_sq on tensor rank t of the writer? The answers are views of mapped files: nothing is read
before the values are used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from megatron.base.errors import CheckpointError
from megatron.checkpoint.optimizer_state import steps_taken
from megatron.checkpoint.stored_layout import ParameterKey, StoredParameter

__all__ = [
    "KINDS",
    "FlatState",
    "Kind",
    "OptimizerReader",
    "Partition",
    "WholeOptimizer",
    "WholeState",
    "adam_steps",
]

Kind = Literal["master", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("master", "exp_avg", "exp_avg_sq")


class OptimizerReader(Protocol):
    """Knows the optimizer state of every stage and tensor rank."""

    def pieces(
        self, key: ParameterKey, place: StoredParameter, tensor_rank: int, kind: Kind
    ) -> list[torch.Tensor]:
        """Return ``tensor_rank``'s part of a parameter in consecutive flat pieces.

        No pieces: the optimizer has no moments of the parameter.

        Raises:
            CheckpointError: a file is missing or damaged, or holds other sizes.
        """
        ...


@dataclass(frozen=True)
class Partition:
    """One data-parallel rank's part of every group's flat vector, as a file holds it."""

    source: str  # the file, for messages
    masters: Sequence[torch.Tensor]
    optimizer: Mapping[str, Any]  # the state_dict of torch's optimizer
    lengths: Sequence[int]  # elements of each group's part, the padding at its end included

    @classmethod
    def of_zero(cls, state: Mapping[str, Any], source: str) -> "Partition":
        """Return the part that the state of ZeRO's or of the bf16 optimizer describes."""
        masters = state["single_partition_of_fp32_groups"]
        # ZeRO cuts the padding off the masters, but not off the moments; the other keeps it.
        paddings = state["group_paddings"] if "zero_stage" in state else [0] * len(masters)
        lengths = [
            master.numel() + padding for master, padding in zip(masters, paddings, strict=True)
        ]
        return cls(source, masters, state["base_optimizer_state"], lengths)

    def vector(self, group: int, kind: Kind) -> torch.Tensor | None:
        """Return the part of a group's vector; None: there are no moments yet."""
        if kind == "master":
            return self.masters[group]
        number = self.optimizer["param_groups"][group]["params"][0]
        return _moment(self.optimizer, number, kind, self.source)


class FlatState:
    """Each group's parameters in one vector, divided evenly over the data-parallel ranks.

    Args:
        open_partition: returns the part of (stage, tensor rank, data-parallel rank).
        step: Adam steps that all parts must have taken.
    """

    def __init__(self, open_partition: Callable[[int, int, int], Partition], step: int) -> None:
        self._open = open_partition
        self._step = step
        self._opened: dict[tuple[int, int, int], Partition] = {}

    def pieces(
        self, key: ParameterKey, place: StoredParameter, tensor_rank: int, kind: Kind
    ) -> list[torch.Tensor]:
        """Return one piece, or more if data-parallel ranks shared the parameter."""
        length = self._partition(place.stage, tensor_rank, 0).lengths[place.group]
        stop = place.offset + place.num_elements
        pieces = []
        for data_rank in range(place.offset // length, -(-stop // length)):
            partition = self._partition(place.stage, tensor_rank, data_rank)
            vector = partition.vector(place.group, kind)
            if vector is None:
                return []
            begin = data_rank * length
            first, last = max(place.offset - begin, 0), min(stop - begin, length)
            if vector.dim() != 1 or vector.numel() < last:
                raise CheckpointError(
                    f"{partition.source}: {kind} of group {place.group} has shape "
                    f"{tuple(vector.shape)}, but its elements {first} to {last} belong to "
                    f"{key[1]} of layer {key[0]}: the file belongs to another model or save"
                )
            pieces.append(vector[first:last])
        return pieces

    def _partition(self, stage: int, tensor_rank: int, data_rank: int) -> Partition:
        where = stage, tensor_rank, data_rank
        if where not in self._opened:
            opened = self._open(*where)
            _require_steps(opened.optimizer, self._step, opened.source)
            first = self._opened.get((stage, tensor_rank, 0), opened)
            if opened.lengths != first.lengths:
                raise CheckpointError(
                    f"{opened.source} holds parts of {opened.lengths} elements, {first.source} "
                    f"parts of {first.lengths}: the files come from different saves"
                )
            self._opened[where] = opened
        return self._opened[where]


@dataclass(frozen=True)
class WholeOptimizer:
    """The optimizer of one stage and tensor rank, with a tensor for each parameter."""

    source: str  # the file, for messages
    optimizer: Mapping[str, Any]  # the state_dict of torch's optimizer
    masters: Sequence[torch.Tensor] | None  # in order; None: the weights are the masters

    def tensor(self, index: int, kind: Kind) -> torch.Tensor | None:
        """Return a parameter's tensor; None: it has no moments, or its weight is the master."""
        if kind == "master":
            return None if self.masters is None else self.masters[index]
        numbers = [number for group in self.optimizer["param_groups"] for number in group["params"]]
        return _moment(self.optimizer, numbers[index], kind, self.source)


class WholeState:
    """The plain optimizer, and DeepSpeed's fp16 one around torch's: nothing is flattened.

    Args:
        open_optimizer: returns the state of (stage, tensor rank).
        weight: returns the weight of a parameter on a tensor rank.
        step: Adam steps that all must have taken.
    """

    def __init__(
        self,
        open_optimizer: Callable[[int, int], WholeOptimizer],
        weight: Callable[[ParameterKey, int], torch.Tensor],
        step: int,
    ) -> None:
        self._open = open_optimizer
        self._weight = weight
        self._step = step
        self._opened: dict[tuple[int, int], WholeOptimizer] = {}

    def pieces(
        self, key: ParameterKey, place: StoredParameter, tensor_rank: int, kind: Kind
    ) -> list[torch.Tensor]:
        """Return the tensor in one piece."""
        where = place.stage, tensor_rank
        if where not in self._opened:
            opened = self._open(*where)
            _require_steps(opened.optimizer, self._step, opened.source)
            self._opened[where] = opened
        state = self._opened[where]
        tensor = state.tensor(place.index, kind)
        if tensor is None:
            if kind != "master":
                return []  # unused parameters have no gradient, and so no moments
            tensor = self._weight(key, tensor_rank)
        if tuple(tensor.shape) != place.shape:
            raise CheckpointError(
                f"{state.source}: {kind} of parameter {place.index} has shape "
                f"{tuple(tensor.shape)}, but {key[1]} of layer {key[0]} has {place.shape}: the "
                "optimizer state belongs to another model or save"
            )
        return [tensor.reshape(-1)]


def _moment(
    optimizer: Mapping[str, Any], number: Any, kind: Kind, source: str
) -> torch.Tensor | None:
    entry = optimizer["state"].get(number)
    if not entry:
        return None
    if not torch.is_tensor(entry.get(kind)):
        raise CheckpointError(
            f"{source} holds {', '.join(sorted(map(str, entry)))} of each parameter and no {kind}: "
            "it is the state of another optimizer than Adam; load the weights alone with "
            "no_load_optim: true or finetune: true"
        )
    return entry[kind]


def adam_steps(optimizer: Mapping[str, Any]) -> int:
    """Return the steps that the ``state_dict`` of torch's optimizer says were taken."""
    return max(
        (steps_taken(group, optimizer["state"]) for group in optimizer["param_groups"]), default=0
    )


def _require_steps(optimizer: Mapping[str, Any], step: int, source: str) -> None:
    taken = adam_steps(optimizer)
    if taken != step:
        raise CheckpointError(
            f"{source} was saved after {taken} optimizer steps, other files of the checkpoint "
            f"after {step}: they come from different saves"
        )
