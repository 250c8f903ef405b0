"""What every layer of a plan is built with."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from megatron.model.initialisation import initialise_layer
from megatron.model.parallel_layers import TensorParallel
from megatron.model.rotary import RotaryTable
from megatron.model.score_bias import RelativeBias
from megatron.model.settings import ModelSettings

__all__ = ["Construction", "finish"]


@dataclass(frozen=True)
class Construction:
    """Shared by all layers of one rank's plan."""

    settings: ModelSettings
    tensor_parallel: TensorParallel
    seed: int
    dtype: torch.dtype
    device: torch.device
    dropout_rng: Callable[[], AbstractContextManager[None]]
    """Entered around dropout whose masks differ between tensor ranks: that of the attention."""

    rotary: RotaryTable | None  # one table for all blocks
    relative_bias: RelativeBias | None  # likewise


def finish(layer: torch.nn.Module, layer_index: int, construction: Construction) -> None:
    """Give a new layer its first values and move it to its device."""
    initialise_layer(
        layer,
        layer_index=layer_index,
        seed=construction.seed,
        settings=construction.settings,
        size=construction.tensor_parallel.size,
        rank=construction.tensor_parallel.rank,
    )
    layer.to(construction.device)
