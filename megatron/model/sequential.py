"""A plan as one plain module, for ``pipe_parallel_size: 0``."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from megatron.model.block import ParallelTransformerLayerPipe
from megatron.model.plan import PlannedLayer

__all__ = ["SequentialModel"]

Layer = Callable[[torch.Tensor], torch.Tensor]


class SequentialModel(torch.nn.Module):
    """All layers in one process; tensors are called ``sequential.<layer number>.<name>``."""

    def __init__(
        self,
        plan: Sequence[PlannedLayer],
        *,
        checkpoint: Callable[..., torch.Tensor] | None = None,
        checkpoint_num_layers: int = 1,
    ) -> None:
        """Build every layer.

        Args:
            plan: from ``layer_plan``.
            checkpoint: ``checkpoint(function, hidden)`` computes without keeping activations;
                None keeps them all.
            checkpoint_num_layers: numbered layers per recomputed chunk.
        """
        super().__init__()
        self.sequential = torch.nn.ModuleDict()
        self._layers: list[Layer] = []
        self._checkpoint = checkpoint
        self._chunk_size = checkpoint_num_layers
        tied: dict[str, torch.nn.Module] = {}
        for layer in plan:
            self._layers.append(self._add(layer, tied))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map int64 tokens (batch, sequence) to this rank's logits."""
        hidden = tokens
        for start in range(0, len(self._layers), self._chunk_size):
            chunk = self._layers[start : start + self._chunk_size]
            if self._checkpoint and self.training and all(map(_is_block, chunk)):
                hidden = self._checkpoint(partial(_run, chunk), hidden)
            else:
                hidden = _run(chunk, hidden)
        return hidden

    def _add(self, layer: PlannedLayer, tied: dict[str, torch.nn.Module]) -> Layer:
        if layer.is_function:
            return layer.kind
        module = tied.get(layer.tied_key) if layer.tied_key else None
        if module is None:
            module = layer.build()
            self.sequential[str(layer.index)] = module
            if layer.tied_key:
                tied[layer.tied_key] = module
        return partial(layer.tied_forward, module) if layer.tied_forward else module


def _is_block(layer: Layer) -> bool:
    return isinstance(layer, ParallelTransformerLayerPipe)


def _run(layers: Sequence[Layer], hidden: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        hidden = layer(hidden)
    return hidden
