"""The model as one plain module, for ``pipe_parallel_size: 0``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from megatron.model.layer_plan import PlannedLayer

__all__ = ["SequentialModel"]


class SequentialModel(nn.Module):
    """Runs the planned layers one after the other on one rank (and its tensor-parallel peers).

    Parameters are named ``sequential.{layer index}.{name}``, as in NeoX's files.
    """

    def __init__(
        self,
        plan: Sequence[PlannedLayer],
        *,
        checkpoint_interval: int,
        checkpoint: Callable[..., Any],
    ) -> None:
        super().__init__()
        self.sequential = nn.ModuleDict()
        self._steps: list[tuple[Callable[[Any], Any], bool]] = []
        tied: dict[str, nn.Module] = {}
        for layer in plan:
            function: Callable[[Any], Any]
            if layer.tied_key is not None and layer.tied_key in tied:
                function = layer.bind_tied(tied[layer.tied_key])
            else:
                function = layer.factory()
                if isinstance(function, nn.Module):
                    self.sequential[str(layer.index)] = function
                if layer.tied_key is not None:
                    tied[layer.tied_key] = function
            self._steps.append((function, layer.is_transformer))
        self._interval = checkpoint_interval
        self._checkpoint = checkpoint

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of ``hidden`` (token ids, shape (batch, sequence))."""
        interval = self._interval or len(self._steps)
        for start in range(0, len(self._steps), interval):
            chunk = self._steps[start : start + interval]
            run = _composed([function for function, _ in chunk])
            # Like NeoX: a chunk is recomputed only if it holds transformer layers and nothing else.
            recomputes = self._interval and self.training and all(flag for _, flag in chunk)
            hidden = self._checkpoint(run, hidden) if recomputes else run(hidden)
        return hidden


def _composed(functions: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def run(value: Any) -> Any:
        for function in functions:
            value = function(value)
        return value

    return run
