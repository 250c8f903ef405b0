"""Weights' fp32 masters and Adam's moments of any checkpoint, by parameter and tensor rank.

One form for every writer: any tensor-, pipeline- and data-parallel size, ZeRO 0, 1 and 2, fp32,
bf16 and fp16, ours and NeoX's. Nothing is read before it is asked for; files are mapped.

    states = open_parameter_states(StoredCheckpoint(path), settings)
    states.part(2, "mlp.linear1.weight", "exp_avg", size=4, rank=3)   # tensor rank 3 of 4
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, overload

import torch

from megatron.checkpoint.compatibility import AdamStepRule
from megatron.checkpoint.flat_partitions import KINDS, Kind
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.checkpoint.stored_layout import ParameterKey, StoredParameter
from megatron.checkpoint.stored_optimizer import (
    LossScale,
    StoredGroup,
    StoredOptimizer,
    gradient_multiple_notice,
    open_stored_optimizer,
)
from megatron.checkpoint.v1_optimizer import open_v1_optimizer
from megatron.checkpoint.weights import rank_part
from megatron.model.settings import ModelSettings

__all__ = ["LossScale", "ParameterStates", "StoredGroup", "open_parameter_states"]


class ParameterStates:
    """The optimizer state of one checkpoint; see the module's example.

    Attributes:
        stored: the checkpoint.
        step: Adam steps taken; fp16 steps that overflowed don't count.
        groups: parameter groups over all stages.
        scaler: state of the dynamic loss scaler, None if the writer had none.
        gradient_multiple: the writer's moments were those of gradients so many times ours;
            :meth:`part` has divided it out.
        names: layer and name of every parameter, in the order of the layers.
    """

    def __init__(
        self, stored: StoredCheckpoint, settings: ModelSettings, optimizer: StoredOptimizer
    ) -> None:
        self.stored = stored
        self.step = optimizer.step
        self.groups = optimizer.groups
        self.scaler = optimizer.scaler
        self.gradient_multiple = optimizer.gradient_multiple
        self._settings = settings
        self._reader = optimizer.reader
        self._places: dict[ParameterKey, StoredParameter] = {}
        for layout in optimizer.layouts:
            for key, place in layout.items():
                self._places.setdefault(key, place)  # the first of two stages that share a layer
        self.names = tuple(sorted(self._places, key=lambda key: key[0]))

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Content of the first model-states file: scheduler, counters, arguments."""
        return self.stored.model_states(self.stored.model_ranks[0])

    @cached_property
    def weight_dtype(self) -> torch.dtype:
        """Of the stored weights."""
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
        return flat.detach().view(place.shape)  # masters are stored as parameters

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


def open_parameter_states(
    stored: StoredCheckpoint, settings: ModelSettings, *, adam_step: AdamStepRule = "continue"
) -> ParameterStates:
    """Return the optimizer state of a checkpoint; metadata is read, no values are.

    Args:
        stored: the checkpoint, ours or NeoX's.
        settings: the model, with the checkpoint's pinned vocabulary.
        adam_step: what Adam has counted where NeoX v1.0 didn't store it.

    Raises:
        CheckpointError: it holds no optimizer state, or one that cannot be read.
    """
    if stored.is_v1 and stored.optimizer_files:
        optimizer = open_v1_optimizer(stored, settings, adam_step=adam_step)
    else:
        optimizer = open_stored_optimizer(stored, settings)
    return ParameterStates(stored, settings, optimizer)
