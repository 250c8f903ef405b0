"""The model group: all of NeoX's model keys, declared in four parts."""

from dataclasses import dataclass

from megatron.config.groups.model_attention import ModelAttention
from megatron.config.groups.model_numerics import ModelNumerics
from megatron.config.groups.model_shape import ModelShape
from megatron.config.groups.model_variants import ModelVariants

__all__ = ["Model"]


@dataclass(frozen=True, kw_only=True)
class Model(ModelShape, ModelAttention, ModelNumerics, ModelVariants):
    """What is trained: shape, attention, numerics and kernels, and variants."""
