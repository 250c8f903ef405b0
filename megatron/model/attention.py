"""Causal self-attention over this rank's heads.

Shapes: S sequence, B batch, N this rank's query heads, K its key heads, D head size.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from megatron.model.construction import Construction
from megatron.model.feed_forward import row_linear
from megatron.model.key_value_cache import KeyValueCache
from megatron.model.norms import build_norm
from megatron.model.parallel_layers import ColumnLinear, mark_divided
from megatron.model.rotary import RotaryFrequencies
from megatron.model.score_bias import AlibiSlopes, ScoreBias
from megatron.model.tp_layout import local_heads

__all__ = ["Attention"]


class Attention(torch.nn.Module):
    """Fused query-key-value matrix, positions, scaled dot products, output matrix.

    "flash" and "global" attention are both torch's scaled-dot-product attention, whose kernels
    know causality without a mask.
    """

    def __init__(self, construction: Construction, block: int) -> None:
        super().__init__()
        settings = construction.settings
        size = construction.tensor_parallel.size
        heads = local_heads(settings, size=size, rank=construction.tensor_parallel.rank)
        self.qk_layernorm = None
        if settings.normalises_queries_and_keys:
            shape = (len(heads), settings.head_size)
            self.qk_layernorm = build_norm(settings, construction.dtype, shape)
            for parameter in self.qk_layernorm.parameters():
                mark_divided(parameter, dim=0)
        self.block = block
        self.cache: KeyValueCache | None = None  # set where text is generated
        self.head_size = settings.head_size
        self.num_heads = settings.num_attention_heads // size
        self.num_kv_heads = settings.num_kv_heads // size
        self.is_grouped_query = settings.is_grouped_query
        self.dropout = settings.attention_dropout
        self.dropout_rng = construction.dropout_rng
        self.query_key_value = ColumnLinear(
            settings.hidden_size,
            (settings.num_attention_heads + 2 * settings.num_kv_heads) * settings.head_size,
            bias=settings.bias_in_attention,
            dtype=construction.dtype,
            tensor_parallel=construction.tensor_parallel,
        )
        if settings.saves_rotary_frequencies:
            self.rotary_emb = RotaryFrequencies(
                settings.rotary_dims, settings.rotary_base, construction.dtype
            )
        kind = construction.relative_bias
        if kind is not None:
            self.rpe = kind
        elif settings.pos_emb == "alibi":
            self.alibi_embed = kind = AlibiSlopes(settings, heads)
        self.score_bias = ScoreBias.of_block(settings, kind, block)
        self.dense = row_linear(settings.hidden_size, construction, bias=settings.bias_in_attention)
        self.rotary = construction.rotary

    def forward(self, hidden_sbh: torch.Tensor) -> torch.Tensor:
        """Return the attention's output, whole or partial as the output matrix gives it."""
        query, key, value = self._query_key_value(hidden_sbh)
        # (S, B, heads, D) -> (B, heads, S, D)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        if self.cache is not None:
            key, value = self.cache.extend(self.block, key, value)
        context_bnsd = self._attend(query, key, value)
        context_sbh = context_bnsd.permute(2, 0, 1, 3).flatten(start_dim=2)
        return self.dense(context_sbh)

    def _query_key_value(self, hidden_sbh: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fused = self.query_key_value(hidden_sbh)
        if not self.is_grouped_query:
            # Per head: query, key, value.
            heads = fused.unflatten(-1, (self.num_heads, 3, self.head_size))
            if self.qk_layernorm is not None:
                query, key, value = heads.unbind(dim=-2)
                query, key = self.qk_layernorm(query), self.qk_layernorm(key)
                return self._rotated(query), self._rotated(key), value
            if self.rotary is None:
                return heads.unbind(dim=-2)
            query, key = self._rotated(heads[..., :2, :]).unbind(dim=-2)
            return query, key, heads[..., 2, :]
        # All query heads, then all key heads, then all value heads.
        heads = fused.unflatten(-1, (-1, self.head_size))
        num_rotated = self.num_heads + self.num_kv_heads
        rotated, value = heads[..., :num_rotated, :], heads[..., num_rotated:, :]
        rotated = self._rotated(rotated)
        query, key = rotated[..., : self.num_heads, :], rotated[..., self.num_heads :, :]
        return query, key, value

    def _rotated(self, heads: torch.Tensor) -> torch.Tensor:
        if self.rotary is None:
            return heads
        return self.rotary(heads, first=0 if self.cache is None else self.cache.past)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        past = key.shape[-2] - query.shape[-2]
        bias = self.score_bias.added(query.shape[-2], query, past=past)
        drops = self.training and self.dropout > 0
        with self.dropout_rng() if drops else nullcontext():
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=bias,
                dropout_p=self.dropout if drops else 0.0,
                is_causal=bias is None and past == 0,  # one token sees all before it
                enable_gqa=self.is_grouped_query,
            )
