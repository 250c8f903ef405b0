"""NeoX's numbered layers of a model.

    0             EmbeddingPipe                    layer_00 file
    1             to_sequence_first                no parameters, no file
    2 .. L+1      ParallelTransformerLayerPipe
    L+2           to_batch_first                   no parameters, no file
    L+3           NormPipe
    L+4           ParallelLinearPipe, or the embedding again ("embed") when it is tied

The numbers are part of checkpoint names and never depend on the topology.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from megatron.model.block import ParallelTransformerLayerPipe
from megatron.model.construction import Construction
from megatron.model.embedding import EmbeddingPipe, to_sequence_first
from megatron.model.head import NormPipe, ParallelLinearPipe, TiedHead, to_batch_first
from megatron.model.parallel_layers import TensorParallel
from megatron.model.rotary import RotaryTable
from megatron.model.score_bias import relative_bias
from megatron.model.settings import FIRST_BLOCK, ModelSettings

__all__ = ["TIED_KEY", "TIED_WEIGHT", "PlannedLayer", "layer_plan"]

TIED_KEY = "embed"
TIED_WEIGHT = "word_embeddings.weight"  # the one parameter both ends share


@dataclass(frozen=True)
class PlannedLayer:
    """One numbered layer, not built yet."""

    index: int
    kind: Any  # the torch.nn.Module class, or the function itself
    factory: Callable[[], Any]
    """Returns the module, with its first values, on its device; or the function."""

    tied_key: str | None = None  # layers with the same key are one module
    tied_forward: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    """How a tied layer is computed from the module, when not by the module's own forward."""

    @property
    def is_function(self) -> bool:
        """Whether the layer has no parameters."""
        return not isinstance(self.kind, type)

    @property
    def is_transformer(self) -> bool:
        """Whether the layer is a block, which activation checkpointing may recompute."""
        return self.kind is ParallelTransformerLayerPipe

    @property
    def tied_weights(self) -> list[str]:
        """Parameters whose gradients are summed over the stages that hold the module."""
        return [TIED_WEIGHT] if self.tied_key else []

    def bind_tied(self, module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the layer as a function of the hidden state, given its already built module."""
        return module if self.tied_forward is None else partial(self.tied_forward, module)


def layer_plan(
    settings: ModelSettings,
    tensor_parallel: TensorParallel,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    dropout_rng: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[PlannedLayer]:
    """Return the model's layers in order.

    Args:
        settings: the architecture.
        tensor_parallel: this rank's place among the ranks that share every layer.
        seed: first values depend on it, and on nothing else that varies between ranks.
        dtype: of parameters and activations.
        device: where layers are put when built.
        dropout_rng: entered around dropout whose masks must differ between tensor ranks.

    Raises:
        ConfigError: heads or MLP don't divide over the tensor ranks.
    """
    settings.require_divisible(tensor_parallel.size)
    construction = Construction(
        settings=settings,
        tensor_parallel=tensor_parallel,
        seed=seed,
        dtype=dtype,
        device=torch.device(device),
        dropout_rng=dropout_rng,
        rotary=_rotary_table(settings, dtype),
        relative_bias=relative_bias(
            settings, size=tensor_parallel.size, rank=tensor_parallel.rank, dtype=dtype
        ),
    )
    after_blocks = FIRST_BLOCK + settings.num_layers

    def planned(index: int, kind: type[torch.nn.Module], **tied: Any) -> PlannedLayer:
        return PlannedLayer(index, kind, partial(kind, construction, index), **tied)

    def function(index: int, slot: Callable[[torch.Tensor], torch.Tensor]) -> PlannedLayer:
        return PlannedLayer(index, slot, lambda: slot)

    if settings.tied_embedding:
        embedding = planned(0, EmbeddingPipe, tied_key=TIED_KEY)
        # The last stage builds the embedding once more, from the same first values.
        head = replace(
            embedding,
            index=after_blocks + 2,
            tied_forward=TiedHead(settings, tensor_parallel),
        )
    else:
        embedding = planned(0, EmbeddingPipe)
        head = planned(after_blocks + 2, ParallelLinearPipe)
    return [
        embedding,
        function(1, to_sequence_first),
        *(
            planned(index, ParallelTransformerLayerPipe)
            for index in range(FIRST_BLOCK, after_blocks)
        ),
        function(after_blocks, to_batch_first),
        planned(after_blocks + 1, NormPipe),
        head,
    ]


def _rotary_table(settings: ModelSettings, dtype: torch.dtype) -> RotaryTable | None:
    if settings.pos_emb != "rotary":
        return None
    return RotaryTable(
        settings.seq_length,
        settings.rotary_dims,
        settings.rotary_base,
        dtype,
        dtype if settings.rotary_angles == "parameters" else torch.float32,
    )
