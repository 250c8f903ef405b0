"""Norms over the hidden dimension, with NeoX's parameter names."""

import torch
import torch.nn.functional as F

from megatron.model.settings import ModelSettings

__all__ = ["RMSNorm", "build_norm"]


class RMSNorm(torch.nn.Module):
    """Divide by the root mean square, in float32, and scale. The parameter is called ``scale``."""

    def __init__(self, hidden_size: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.scale = torch.nn.Parameter(torch.ones(hidden_size, dtype=dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # torch computes in float32 whatever the input's type, as NeoX does.
        return F.rms_norm(hidden, self.scale.shape, self.scale, self.epsilon)


def build_norm(settings: ModelSettings, dtype: torch.dtype) -> torch.nn.Module:
    """Return a new norm of the model's kind."""
    if settings.norm == "rmsnorm":
        return RMSNorm(settings.hidden_size, settings.norm_epsilon, dtype)
    return torch.nn.LayerNorm(settings.hidden_size, settings.norm_epsilon, dtype=dtype)
