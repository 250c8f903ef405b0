"""Model FLOPs of a step, as NeoX counts them."""

from dataclasses import dataclass

__all__ = ["ModelShape", "flops_per_step", "format_flops"]


@dataclass(frozen=True)
class ModelShape:
    """The sizes the FLOP count needs."""

    num_layers: int
    hidden_size: int
    seq_length: int  # tokens
    padded_vocab_size: int


def flops_per_step(shape: ModelShape, global_batch_size: int, *, recomputes: bool) -> float:
    """Return floating-point operations of one step over all ranks.

    24·c·B·S·L·h²·(1 + S/(6h) + V/(16·L·h)) with c = 3 passes (forward, and backward twice as
    dear), 4 with activation checkpointing. Source: spec/training.md §7.
    """
    layers, hidden = shape.num_layers, shape.hidden_size
    passes = 4 if recomputes else 3
    attention = shape.seq_length / (6 * hidden)
    logits = shape.padded_vocab_size / (16 * layers * hidden)
    tokens = global_batch_size * shape.seq_length
    return 24 * passes * tokens * layers * hidden**2 * (1 + attention + logits)


def format_flops(value: float) -> str:
    """Return ``value`` with NeoX's unit, ``22.7MFLOPS``."""
    units = ["", "K", "M", "G", "T", "P", "E"]
    for unit in units:
        if abs(value) < 1000.0:
            return f"{value:3.1f}{unit}FLOPS"
        value /= 1000.0
    return f"{value:.1f}ZFLOPS"
