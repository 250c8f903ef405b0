"""The first layer: tokens to hidden states."""

import torch
import torch.nn.functional as F

from megatron.model.construction import Construction, finish
from megatron.model.key_value_cache import KeyValueCache
from megatron.model.parallel_layers import VocabularyEmbedding
from megatron.model.tp_layout import local_vocabulary_rows

__all__ = ["EmbeddingPipe", "to_sequence_first"]


class SinusoidalPositions(torch.nn.Module):
    """Sines and cosines of a position at frequencies 10000^(-2j/H) (spec/model.md §5)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        exponents = torch.arange(0, hidden_size, 2, dtype=torch.float32) / hidden_size
        self.register_buffer("inv_freq", 10000.0**-exponents)

    def forward(self, first: int, last: int) -> torch.Tensor:
        """Return (last - first, H): all sines, then all cosines."""
        positions = torch.arange(first, last, device=self.inv_freq.device)
        angles = torch.outer(positions.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class EmbeddingPipe(torch.nn.Module):
    """Word embedding, learned or sinusoidal positions if the model has them, dropout."""

    def __init__(self, construction: Construction, layer_index: int) -> None:
        super().__init__()
        settings = construction.settings
        self.tensor_parallel = construction.tensor_parallel
        self.dropout = settings.hidden_dropout
        self.cache: KeyValueCache | None = None  # set where text is generated
        self.position_offset = settings.position_offset
        size = construction.tensor_parallel.size
        self.word_embeddings = VocabularyEmbedding(
            local_vocabulary_rows(settings, size) * size,
            settings.hidden_size,
            dtype=construction.dtype,
            tensor_parallel=construction.tensor_parallel,
        )
        self.position_embeddings = None
        if settings.pos_emb == "learned":
            self.position_embeddings = torch.nn.Embedding(
                settings.max_position_embeddings,
                settings.hidden_size,
                # Filled by `initialisation`; given here so that torch draws nothing.
                _weight=torch.empty(
                    settings.max_position_embeddings,
                    settings.hidden_size,
                    dtype=construction.dtype,
                ),
            )
        elif settings.pos_emb == "sinusoidal":
            self.position_embeddings = SinusoidalPositions(settings.hidden_size)
        finish(self, layer_index, construction)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map int64 tokens (B, S) to hidden states (B, S, H)."""
        hidden = self.word_embeddings(tokens)
        first = 0 if self.cache is None else self.cache.past
        last = first + tokens.shape[1]
        if isinstance(self.position_embeddings, SinusoidalPositions):
            hidden = hidden + self.position_embeddings(first, last).to(hidden.dtype)
        elif self.position_embeddings is not None:
            table = self.position_embeddings.weight[self.position_offset :]
            hidden = hidden + table[first:last]
        if self.training and self.dropout > 0:
            hidden = F.dropout(hidden, self.dropout)
        return hidden


def to_sequence_first(hidden_bsh: torch.Tensor) -> torch.Tensor:
    """Layer 1 of every NeoX model: (B, S, H) to (S, B, H)."""
    return hidden_bsh.transpose(0, 1).contiguous()
