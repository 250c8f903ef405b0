"""The first layer: tokens to hidden states."""

import torch
import torch.nn.functional as F

from megatron.model.construction import Construction, finish
from megatron.model.parallel_layers import VocabularyEmbedding
from megatron.model.tp_layout import local_vocabulary_rows

__all__ = ["EmbeddingPipe", "to_sequence_first"]


class EmbeddingPipe(torch.nn.Module):
    """Word embedding, learned positions if the model has them, dropout."""

    def __init__(self, construction: Construction, layer_index: int) -> None:
        super().__init__()
        settings = construction.settings
        self.tensor_parallel = construction.tensor_parallel
        self.dropout = settings.hidden_dropout
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
        finish(self, layer_index, construction)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map int64 tokens (B, S) to hidden states (B, S, H)."""
        hidden = self.word_embeddings(tokens)
        if self.position_embeddings is not None:
            first = self.position_offset
            hidden = hidden + self.position_embeddings.weight[first : first + tokens.shape[1]]
        if self.training and self.dropout > 0:
            hidden = F.dropout(hidden, self.dropout)
        return hidden


def to_sequence_first(hidden_bsh: torch.Tensor) -> torch.Tensor:
    """Layer 1 of every NeoX model: (B, S, H) to (S, B, H)."""
    return hidden_bsh.transpose(0, 1).contiguous()
