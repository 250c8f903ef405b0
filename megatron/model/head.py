"""The last layers: hidden states to this rank's logits."""

import torch
import torch.nn.functional as F

from megatron.model.construction import Construction, finish
from megatron.model.embedding import EmbeddingPipe
from megatron.model.norms import build_norm
from megatron.model.parallel_layers import ColumnLinear, TensorParallel, column_product
from megatron.model.settings import ModelSettings
from megatron.model.tp_layout import local_vocabulary_rows

__all__ = ["NormPipe", "ParallelLinearPipe", "TiedHead", "to_batch_first"]


def to_batch_first(hidden_sbh: torch.Tensor) -> torch.Tensor:
    """Layer num_layers + 2 of every NeoX model: (S, B, H) to (B, S, H)."""
    return hidden_sbh.transpose(0, 1).contiguous()


class NormPipe(torch.nn.Module):
    """The norm after the last block."""

    def __init__(self, construction: Construction, layer_index: int) -> None:
        super().__init__()
        self.norm = build_norm(construction.settings, construction.dtype)
        finish(self, layer_index, construction)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden)


class ParallelLinearPipe(torch.nn.Module):
    """Output matrix of a model whose embedding is not tied."""

    def __init__(self, construction: Construction, layer_index: int) -> None:
        super().__init__()
        settings = construction.settings
        self.tensor_parallel = construction.tensor_parallel
        self.num_valid_rows = _valid_rows(settings, self.tensor_parallel)
        size = self.tensor_parallel.size
        self.final_linear = ColumnLinear(
            settings.hidden_size,
            local_vocabulary_rows(settings, size) * size,
            bias=False,
            dtype=construction.dtype,
            tensor_parallel=self.tensor_parallel,
        )
        finish(self, layer_index, construction)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (B, S, H) to this rank's logits (B, S, vocabulary rows / ranks)."""
        return _without_extra_rows(self.final_linear(hidden), self.num_valid_rows)


class TiedHead:
    """Logits from the embedding's own matrix: DeepSpeed calls it with the tied module."""

    def __init__(self, settings: ModelSettings, tensor_parallel: TensorParallel) -> None:
        self.tensor_parallel = tensor_parallel
        self.num_valid_rows = _valid_rows(settings, tensor_parallel)

    def __call__(self, embedding: EmbeddingPipe, hidden: torch.Tensor) -> torch.Tensor:
        """Map (B, S, H) to this rank's logits (B, S, vocabulary rows / ranks)."""
        logits = column_product(hidden, embedding.word_embeddings.weight, self.tensor_parallel)
        return _without_extra_rows(logits, self.num_valid_rows)


def _valid_rows(settings: ModelSettings, tensor_parallel: TensorParallel) -> int:
    rows = local_vocabulary_rows(settings, tensor_parallel.size)
    return min(rows, max(0, settings.padded_vocab_size - tensor_parallel.rank * rows))


def _without_extra_rows(logits: torch.Tensor, num_valid: int) -> torch.Tensor:
    """Give rows beyond the pinned vocabulary no probability and no gradient."""
    extra = logits.shape[-1] - num_valid
    if extra == 0:
        return logits
    return F.pad(logits[..., :num_valid], (0, extra), value=float("-inf"))
