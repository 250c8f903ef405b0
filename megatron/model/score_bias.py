"""What is added to attention scores: T5's relative positions, ALiBi, and the window.

Shapes: S sequence, N this rank's query heads. The formulas are those of spec/model.md §4 and §5.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch

from megatron.model.parallel_layers import mark_divided
from megatron.model.settings import ModelSettings
from megatron.model.tp_layout import local_heads

__all__ = [
    "AlibiSlopes",
    "RelativeBias",
    "ScoreBias",
    "alibi_slopes",
    "relative_bias",
    "relative_buckets",
]


class RelativeBias(torch.nn.Module):
    """T5's causal relative positions: a learned value per head and bucket of distances.

    One table serves all blocks of a stage. Its first values are drawn like a matrix's.
    """

    def __init__(self, settings: ModelSettings, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.max_distance = settings.rpe_max_distance
        self.scale = math.sqrt(settings.head_size)
        self.weight = torch.nn.Parameter(torch.empty(settings.rpe_num_buckets, heads, dtype=dtype))
        mark_divided(self.weight, dim=1)

    def forward(self, distances: torch.Tensor) -> torch.Tensor:
        """Map distances (queries, keys) to biases (N, queries, keys)."""
        buckets = relative_buckets(distances, len(self.weight), self.max_distance)
        return (self.weight[buckets] * self.scale).permute(2, 0, 1)


class AlibiSlopes(torch.nn.Module):
    """ALiBi: a score loses a head's slope for each token of distance."""

    def __init__(self, settings: ModelSettings, heads: range) -> None:
        super().__init__()
        slopes = alibi_slopes(settings.num_attention_heads)[heads.start : heads.stop]
        self.register_buffer("slopes", torch.tensor(slopes))

    def forward(self, distances: torch.Tensor) -> torch.Tensor:
        """Map distances (queries, keys) to biases (N, queries, keys)."""
        return -self.slopes[:, None, None] * distances


@dataclass(frozen=True)
class ScoreBias:
    """Adds up a block's biases and its mask; nothing where plain causal attention is meant."""

    kind: RelativeBias | AlibiSlopes | None  # of the positions, if they act on scores
    window: int | None  # tokens before itself that a token sees
    factor: int = 1
    """Of the biases. Where scores are divided by the block's number and all is multiplied by it
    afterwards (to keep fp16 in range), that is what remains of it."""

    @classmethod
    def of_block(
        cls, settings: ModelSettings, kind: RelativeBias | AlibiSlopes | None, block: int
    ) -> Self:
        """Return what block number ``block``, from 0, adds."""
        factor = max(1, block) if settings.scales_by_layer else 1
        return cls(kind, settings.sliding_window, factor)

    def added(self, length: int, like: torch.Tensor, *, past: int = 0) -> torch.Tensor | None:
        """Return what is added to scores, of the type of ``like``.

        Args:
            length: S, the queries.
            like: a tensor of the wanted type and device.
            past: keys before the first query's own.

        Returns:
            (N or 1, S, past + S); None if nothing but causality is meant, and causality can be had
            without it: from the first token on, or for a single one.
        """
        is_simple = past == 0 or length == 1
        if self.kind is None and self.window is None and is_simple:
            return None
        keys = torch.arange(past + length, device=like.device)
        distances = keys[past:, None] - keys[None, :]
        hidden = distances < 0
        if self.window is not None:
            hidden = hidden | (distances > self.window)
        if self.kind is None:
            bias = torch.zeros(1, *distances.shape, dtype=like.dtype, device=like.device)
        else:
            bias = (self.kind(distances.clamp(min=0)) * self.factor).to(like.dtype)
        return bias.masked_fill(hidden, float("-inf"))


def relative_bias(
    settings: ModelSettings, *, size: int, rank: int, dtype: torch.dtype
) -> RelativeBias | None:
    """Return the table all blocks share, if the model has one."""
    if settings.pos_emb != "rpe":
        return None
    return RelativeBias(settings, len(local_heads(settings, size=size, rank=rank)), dtype)


def relative_buckets(distances: torch.Tensor, buckets: int, max_distance: int) -> torch.Tensor:
    """Return the bucket of every distance: half of them exact, half logarithmic.

    Args:
        distances: integers of 0 or more.
        buckets: how many there are.
        max_distance: from which on all distances share the last bucket.
    """
    exact = buckets // 2
    growth = torch.log(distances.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    large = exact + (growth * (buckets - exact)).long()
    return torch.where(distances < exact, distances, large.clamp(max=buckets - 1))


def alibi_slopes(heads: int) -> list[float]:
    """Return ALiBi's slope of each head.

    Example:
        >>> alibi_slopes(4)
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 / power * (head + 1)) for head in range(power)]
    if power < heads:
        slopes += alibi_slopes(2 * power)[::2][: heads - power]
    return slopes
