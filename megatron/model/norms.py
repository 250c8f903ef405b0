"""Norms over the hidden dimension, with NeoX's parameter names."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron.model.settings import ModelSettings

__all__ = ["NonParametricLayerNorm", "RMSNorm", "ScaleNorm", "build_norm"]


class RMSNorm(torch.nn.Module):
    """Divide by the root mean square, in float32, and scale. The parameter is called ``scale``."""

    def __init__(self, shape: Sequence[int], epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.scale = torch.nn.Parameter(torch.ones(*shape, dtype=dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.scale.dim() == 1:
            # torch computes in float32 whatever the input's type, as NeoX does.
            return F.rms_norm(hidden, self.scale.shape, self.scale, self.epsilon)
        # The mean square is that of the last dimension, also where the scale has two.
        normed = F.rms_norm(hidden.float(), self.scale.shape[-1:], None, self.epsilon)
        return (normed * self.scale).to(hidden.dtype)


class ScaleNorm(torch.nn.Module):
    """Divide by the length, at least epsilon, and multiply with the one parameter ``g``."""

    def __init__(self, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.g = torch.nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        return hidden / length.clamp(min=self.epsilon) * self.g


class NonParametricLayerNorm(torch.nn.Module):
    """LayerNorm without scale and bias."""

    def __init__(self, shape: Sequence[int], epsilon: float) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.epsilon = epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(hidden, self.shape, eps=self.epsilon)


def build_norm(
    settings: ModelSettings, dtype: torch.dtype, shape: Sequence[int] | None = None
) -> torch.nn.Module:
    """Return a new norm of the model's kind.

    Args:
        settings: the model.
        dtype: of parameters.
        shape: of the last dimensions of what is normalised; the hidden size if None.
    """
    shape = (settings.hidden_size,) if shape is None else shape
    if settings.norm == "rmsnorm":
        return RMSNorm(shape, settings.norm_epsilon, dtype)
    if settings.norm == "scalenorm":
        return ScaleNorm(settings.norm_epsilon, dtype)
    if settings.norm == "non_parametric_layernorm":
        return NonParametricLayerNorm(shape, settings.norm_epsilon)
    return torch.nn.LayerNorm(shape, settings.norm_epsilon, dtype=dtype)
