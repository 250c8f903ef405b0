"""GPT-NeoX as one would write it in plain PyTorch: what our trainer's step is measured against.

No megatron-core, no bookkeeping, nothing configurable but sizes. Rotary positions on a part of each
head, layernorms, GELU, parallel residual, untied head. Over tensor ranks each rank holds its heads
and its columns of the MLP, and one all-reduce ends a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PlainShape", "plain_layers", "plain_loss"]


@dataclass(frozen=True)
class PlainShape:
    """Sizes of the model, and the ranks that share its layers."""

    num_layers: int
    hidden: int
    heads: int
    seq_length: int
    vocabulary: int
    rotary_dims: int  # of each head
    hidden_dropout: float
    attention_dropout: float
    ranks: int = 1
    group: Any = None  # torch.distributed's, when there is more than one rank


def plain_layers(shape: PlainShape) -> list[type[nn.Module]]:
    """Return the layers' classes in order: tokens (B, S) in, this rank's logits out."""
    return [Embedding, *[Block] * shape.num_layers, Head]


def plain_loss(shape: PlainShape) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean cross entropy of logits (B, S, vocabulary / ranks) and labels (B, S)."""
    if shape.ranks == 1:
        return lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def divided(logits: Tensor, labels: Tensor) -> Tensor:
        rows = logits.shape[-1]
        largest = logits.detach().amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=shape.group)
        shifted = logits - largest.unsqueeze(-1)
        local = labels - dist.get_rank(shape.group) * rows
        is_here = (local >= 0) & (local < rows)
        picked = shifted.gather(-1, local.clamp(0, rows - 1).unsqueeze(-1)).squeeze(-1)
        predicted = _Sum.apply(picked * is_here, shape.group)
        total = _Sum.apply(shifted.exp().sum(-1), shape.group)
        return (total.log() - predicted).mean()

    return divided


class Embedding(nn.Module):
    def __init__(self, shape: PlainShape) -> None:
        super().__init__()
        self.shape = shape
        self.rows = shape.vocabulary // shape.ranks
        self.words = nn.Embedding(self.rows, shape.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.shape.ranks == 1:
            return F.dropout(self.words(tokens), self.shape.hidden_dropout, self.training)
        local = tokens - dist.get_rank(self.shape.group) * self.rows
        is_here = (local >= 0) & (local < self.rows)
        partial = self.words(local * is_here) * is_here.unsqueeze(-1)
        hidden = _Sum.apply(partial, self.shape.group)
        return F.dropout(hidden, self.shape.hidden_dropout, self.training)


class Block(nn.Module):
    def __init__(self, shape: PlainShape) -> None:
        super().__init__()
        self.shape = shape
        self.heads = shape.heads // shape.ranks
        width = shape.hidden // shape.ranks
        self.attention_norm = nn.LayerNorm(shape.hidden)
        self.mlp_norm = nn.LayerNorm(shape.hidden)
        self.query_key_value = nn.Linear(shape.hidden, 3 * width)
        self.dense = nn.Linear(width, shape.hidden)
        self.up = nn.Linear(shape.hidden, 4 * width)
        self.down = nn.Linear(4 * width, shape.hidden)
        cosines, sines = _rotary_tables(shape)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        shape = self.shape
        attended = self.attend(_shared(self.attention_norm(hidden), shape))
        mlp = self.down(F.gelu(self.up(_shared(self.mlp_norm(hidden), shape))))
        branches = F.dropout(attended, shape.hidden_dropout, self.training) + F.dropout(
            mlp, shape.hidden_dropout, self.training
        )
        return hidden + (branches if shape.ranks == 1 else _Sum.apply(branches, shape.group))

    def attend(self, normed: Tensor) -> Tensor:
        batch, length, _ = normed.shape
        fused = self.query_key_value(normed).view(batch, length, self.heads, -1)
        # (batch, heads, sequence, head size)
        query, key, value = fused.transpose(1, 2).chunk(3, dim=-1)
        dropout = self.shape.attention_dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(
            self.rotate(query), self.rotate(key), value, dropout_p=dropout, is_causal=True
        )
        return self.dense(context.transpose(1, 2).reshape(batch, length, -1))

    def rotate(self, heads: Tensor) -> Tensor:
        dims = self.shape.rotary_dims
        turning, still = heads[..., :dims], heads[..., dims:]
        first, second = turning.chunk(2, dim=-1)
        turned = turning * self.cosines + torch.cat((-second, first), dim=-1) * self.sines
        return torch.cat((turned, still), dim=-1)


class Head(nn.Module):
    def __init__(self, shape: PlainShape) -> None:
        super().__init__()
        self.shape = shape
        self.norm = nn.LayerNorm(shape.hidden)
        self.logits = nn.Linear(shape.hidden, shape.vocabulary // shape.ranks, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logits(_shared(self.norm(hidden), self.shape))


def _rotary_tables(shape: PlainShape) -> tuple[Tensor, Tensor]:
    dims = shape.rotary_dims
    frequencies = 10000.0 ** (-torch.arange(0, dims, 2) / dims)
    angles = torch.outer(torch.arange(shape.seq_length), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _shared(hidden: Tensor, shape: PlainShape) -> Tensor:
    return hidden if shape.ranks == 1 else _Share.apply(hidden, shape.group)


class _Sum(torch.autograd.Function):
    """Sum over ranks on the way forward; every rank's part gets the whole gradient."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Any) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Share(torch.autograd.Function):
    """Give each rank the same tensor; its gradient is the sum of what the ranks did with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
