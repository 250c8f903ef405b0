"""What follows from the written keys, in NeoX's order. Each derivation returns what it adds."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron.config.derivations.attention import derive_attention
from megatron.config.derivations.batch import derive_batch
from megatron.config.derivations.data import derive_data_weights, derive_text_gen_type
from megatron.config.derivations.optimization import (
    derive_onebit_schedule,
    derive_optimizer,
    derive_zero,
)
from megatron.config.derivations.precision import derive_loss_scale, derive_precision
from megatron.config.derivations.ranks import parallelism_derivation
from megatron.config.draft import Draft

__all__ = ["DERIVATIONS", "Derivation", "parallelism_derivation"]

Derivation = Callable[[Draft], Mapping[str, Any]]

# After parallelism_derivation, which also needs to know the machine.
DERIVATIONS: tuple[Derivation, ...] = (
    derive_batch,
    derive_precision,
    derive_zero,
    derive_optimizer,
    derive_onebit_schedule,
    derive_loss_scale,
    derive_attention,
    derive_data_weights,
    derive_text_gen_type,
)
