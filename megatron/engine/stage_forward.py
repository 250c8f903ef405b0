"""One pass of a model without an engine: stage after stage, logits on the last."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
from deepspeed.pipe import PipelineModule
from torch import nn

from megatron.config.topology import RankCoordinates
from megatron.engine.distributed import ProcessGroups
from megatron.model.settings import FIRST_BLOCK, ModelSettings

__all__ = ["StageForward"]


class StageForward:
    """Runs this rank's part of a model in evaluation mode. All ranks of one copy call together.

    Args:
        module: this rank's pipeline stage, or the sequential model.
        groups: of this rank.
        settings: the model.
        dtype: of activations.
    """

    def __init__(
        self, module: nn.Module, groups: ProcessGroups, settings: ModelSettings, dtype: torch.dtype
    ) -> None:
        self.module = module.eval()
        self._groups = groups
        self._settings = settings
        self._dtype = dtype
        place, stages = groups.place, groups.topology.pipeline_parallel_size
        self.is_first = place.pipeline_stage == 0
        self.is_last = place.pipeline_stage == max(1, stages) - 1

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, *, only_last: bool = False) -> torch.Tensor | None:
        """Return the logits of every position on the last stage; None on the others.

        Args:
            tokens: int64, (B, S), the same on every rank; B is 1 where keys and values are kept.
            only_last: of the last position alone.

        Returns:
            float32, (B, S or 1, padded vocabulary).
        """
        batch, length = tokens.shape
        hidden = tokens if self.is_first else self._receive(batch, length)
        for function in self._functions():
            hidden = function(hidden)
        if not self.is_last:
            torch.distributed.send(hidden.contiguous(), self._neighbour(1))
            return None
        if only_last:
            hidden = hidden[:, -1:]
        return self._whole(hidden.float())

    def from_last_stage(self, values: Sequence[int] | None, count: int) -> list[int]:
        """Return the last stage's ``count`` values on every rank of this copy of the model."""
        groups = self._groups
        box = torch.zeros(count, dtype=torch.int64, device=groups.device)
        if values is not None:
            box.copy_(torch.tensor(values))
        if groups.topology.world_size > groups.topology.data_parallel_size:
            last = max(1, groups.topology.pipeline_parallel_size) - 1
            source = RankCoordinates(last, groups.place.data_parallel_rank, 0)
            torch.distributed.broadcast(box, groups.topology.rank(source), group=groups.model)
        return box.tolist()

    def _functions(self) -> list[Callable[[Any], Any]]:
        if isinstance(self.module, PipelineModule):
            return list(self.module.forward_funcs)
        return [self.module]

    def _receive(self, batch: int, length: int) -> torch.Tensor:
        # Between layer 1 and layer num_layers + 2 the sequence comes first.
        start = self.module._local_start
        is_sequence_first = FIRST_BLOCK <= start <= FIRST_BLOCK + self._settings.num_layers
        shape = (length, batch) if is_sequence_first else (batch, length)
        hidden = torch.empty(
            *shape, self._settings.hidden_size, dtype=self._dtype, device=self._groups.device
        )
        torch.distributed.recv(hidden, self._neighbour(-1))
        return hidden

    def _neighbour(self, offset: int) -> int:
        place = self._groups.place
        return self._groups.topology.rank(
            RankCoordinates(
                place.pipeline_stage + offset,
                place.data_parallel_rank,
                place.tensor_parallel_rank,
            )
        )

    def _whole(self, part: torch.Tensor) -> torch.Tensor:
        size = self._groups.topology.tensor_parallel_size
        if size > 1:
            parts = [torch.empty_like(part) for _ in range(size)]
            torch.distributed.all_gather(parts, part.contiguous(), group=self._groups.tensor)
            part = torch.cat(parts, dim=-1)
        return part[..., : self._settings.padded_vocab_size]
