"""Model keys: attention and positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.config.declare import WORKS, Outcome, key, no_effect, part_of, refused, same_numbers

__all__ = ["ModelAttention"]


def _judge_attention(value: Any, _keys: Mapping[str, Any]) -> Outcome:
    """works for global and flash; other types refused."""
    others = sorted(set(value) - {"global", "flash"})
    if others:
        return refused(f"use global or flash instead of {', '.join(others)}")
    return WORKS


def _judge_positions(value: Any, keys: Mapping[str, Any]) -> Outcome:
    """rpe works on one pipeline stage; everything else always."""
    if value == "rpe" and (keys["pipe_parallel_size"] or 0) > 1:
        return refused(
            "its one table would have to be the same on every stage; use pipe_parallel_size: 1, or "
            "alibi"
        )
    return WORKS


def _tunes_relative_bias(value: Any, keys: Mapping[str, Any]) -> Outcome:
    """no effect without pos_emb: rpe."""
    if keys["pos_emb"] == "rpe":
        return WORKS
    return no_effect("it only tunes pos_emb: rpe, which is off")


@dataclass(frozen=True, kw_only=True)
class ModelAttention:
    """What a token attends to, and how it knows its position."""

    sliding_window_width: int | None = key(None, tier=2, unit="tokens", minimum=1, outcome=WORKS)
    """A token sees itself and so many tokens before it. Unset: all before it."""

    use_qk_layernorm: bool | None = key(False, tier=2, outcome=WORKS)
    """Normalise queries and keys before they meet."""

    pos_emb: Literal["learned", "rotary", "sinusoidal", "rpe", "alibi", "none"] | None = key(
        "learned", outcome=_judge_positions
    )
    """Position scheme: a learned table, rotary, sinusoids, T5's relative bias, ALiBi, or none."""

    rpe_num_buckets: int | None = key(32, tier=2, minimum=1, outcome=_tunes_relative_bias)
    """Distances T5's relative bias tells apart."""

    rpe_max_distance: int | None = key(
        128, tier=2, unit="tokens", minimum=1, outcome=_tunes_relative_bias
    )
    """Distance from which T5's relative bias treats all alike."""

    opt_pos_emb_offset: int | None = key(0, tier=2, unit="tokens", minimum=0, outcome=WORKS)
    """Added to learned positions before the table is read; OPT's models need 2."""

    attention_config: list[Any] | None = key(None, outcome=_judge_attention)
    """Attention per layer: ``[[[type, ...], count or "all"], ...]``, or one name per layer. Unset:
    global everywhere. ``flash`` and ``global`` are the same exact attention here."""

    sparsity_config: dict[str, Any] | None = key(
        None, tier=3, outcome=part_of("attention_config with a sparse type")
    )
    """Options of the sparse attention types."""

    apply_query_key_layer_scaling: bool | None = key(False, outcome=WORKS)
    """Divide scores by the layer's number and multiply again inside an fp32 softmax."""

    attention_softmax_in_fp32: bool | None = key(False, outcome=same_numbers("it always is"))
    """Compute the softmax in fp32 whatever the precision."""

    rotary_pct: float | None = key(
        1.0, unit="of a head's width", minimum=0, maximum=1, outcome=WORKS
    )
    """Part of every head that is rotated."""

    rotary_emb_base: int | None = key(10000, minimum=1, outcome=WORKS)
    """Base of the rotary frequencies; a whole number."""

    rotary_save_freqs_buffer: bool | None = key(False, tier=2, outcome=WORKS)
    """Keep the rotary frequencies in checkpoints."""
