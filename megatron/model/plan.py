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
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron.model.block import ParallelTransformerLayerPipe
from megatron.model.construction import Construction
from megatron.model.embedding import EmbeddingPipe, to_sequence_first
from megatron.model.head import NormPipe, ParallelLinearPipe, TiedHead, to_batch_first
from megatron.model.parallel_layers import TensorParallel
from megatron.model.rotary import RotaryTable
from megatron.model.settings import ModelSettings

__all__ = ["TIED_KEY", "TIED_WEIGHT", "PlannedLayer", "layer_plan"]

TIED_KEY = "embed"
TIED_WEIGHT = "word_embeddings.weight"  # the one parameter both ends share


@dataclass(frozen=True)
class PlannedLayer:
    """One numbered layer, not built yet.

    ``kind(**keywords)`` builds a module; a kind that is no class is the layer itself.
    """

    index: int
    kind: Any  # a torch.nn.Module class, or a function of the hidden state
    keywords: dict[str, Any] = field(default_factory=dict, repr=False)
    tied_key: str | None = None  # layers with the same key are one module
    tied_forward: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] | None = None
    """How a tied layer is computed, when it isn't the module's own forward."""

    @property
    def is_function(self) -> bool:
        """Whether the layer has no parameters and is called as it is."""
        return not isinstance(self.kind, type)

    def build(self) -> torch.nn.Module:
        """Return the layer's module, with its first values, on its device."""
        return self.kind(**self.keywords)


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
    )
    after_blocks = settings.num_layers + 2

    def planned(index: int, kind: Any, **tied: Any) -> PlannedLayer:
        keywords = {"construction": construction, "layer_index": index}
        return PlannedLayer(index, kind, keywords, **tied)

    embedding = planned(0, EmbeddingPipe, tied_key=TIED_KEY if settings.tied_embedding else None)
    if settings.tied_embedding:
        # On the last stage the embedding is built once more, from the same first values.
        head = PlannedLayer(
            after_blocks + 2,
            EmbeddingPipe,
            embedding.keywords,
            tied_key=TIED_KEY,
            tied_forward=TiedHead(settings, tensor_parallel),
        )
    else:
        head = planned(after_blocks + 2, ParallelLinearPipe)
    return [
        embedding,
        PlannedLayer(1, to_sequence_first),
        *(planned(index, ParallelTransformerLayerPipe) for index in range(2, after_blocks)),
        PlannedLayer(after_blocks, to_batch_first),
        planned(after_blocks + 1, NormPipe),
        head,
    ]


def _rotary_table(settings: ModelSettings, dtype: torch.dtype) -> RotaryTable | None:
    if settings.pos_emb != "rotary":
        return None
    return RotaryTable(settings.seq_length, settings.rotary_dims, settings.rotary_base, dtype)
