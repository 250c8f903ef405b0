"""One transformer block."""

import torch
import torch.nn.functional as F

from megatron.model.attention import Attention
from megatron.model.construction import Construction, finish
from megatron.model.feed_forward import FeedForward
from megatron.model.norms import build_norm
from megatron.model.parallel_layers import sum_over_ranks
from megatron.model.settings import FIRST_BLOCK

__all__ = ["ParallelTransformerLayerPipe"]


class ParallelTransformerLayerPipe(torch.nn.Module):
    """Attention and MLP with their norms and residuals; hidden states are (S, B, H).

    The class name is NeoX's: ``pipe_partition_method: type:transformer|mlp`` and DeepSpeed's
    activation checkpointing look for it. Parameters are registered in NeoX's order, which is that
    of the flat vectors in optimizer files.
    """

    def __init__(self, construction: Construction, layer_index: int) -> None:
        super().__init__()
        settings = construction.settings
        self.tensor_parallel = construction.tensor_parallel
        self.is_parallel_residual = settings.gpt_j_residual
        self.is_tied_norm = settings.gpt_j_tied
        self.dropout = settings.hidden_dropout
        self.input_layernorm = build_norm(settings, construction.dtype)
        self.attention = Attention(construction, block=layer_index - FIRST_BLOCK)
        # Exists with gpt_j_tied too, unused: NeoX's files hold it.
        self.post_attention_layernorm = build_norm(settings, construction.dtype)
        self.mlp = FeedForward(construction)
        finish(self, layer_index, construction)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.input_layernorm(hidden)
        if self.is_parallel_residual:
            mlp_input = normed if self.is_tied_norm else self.post_attention_layernorm(hidden)
            # Both branches are this rank's partial sums: one all-reduce serves the two. Hidden
            # dropout draws the same masks on all tensor ranks, so it may come before the sum.
            partial = self._drop(self.attention(normed)) + self._drop(self.mlp(mlp_input))
            return hidden + sum_over_ranks(partial, self.tensor_parallel)
        attended = hidden + self._drop(self.attention(normed))
        return attended + self._drop(self.mlp(self.post_attention_layernorm(attended)))

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        if self.training and self.dropout > 0:
            return F.dropout(branch, self.dropout)
        return branch
