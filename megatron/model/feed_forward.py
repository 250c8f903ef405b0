"""The MLP of a block, plain or gated."""

import torch
import torch.nn.functional as F

from megatron.model.construction import Construction
from megatron.model.parallel_layers import ColumnLinear, PartialRowLinear, ReducedRowLinear

__all__ = ["FeedForward", "row_linear"]


class FeedForward(torch.nn.Module):
    """Widen, activate, narrow."""

    def __init__(self, construction: Construction) -> None:
        super().__init__()
        settings = construction.settings
        self.is_gated = settings.is_gated
        self.approximation = "tanh" if settings.activation == "gelu_tanh" else "none"
        self.linear1 = ColumnLinear(
            settings.hidden_size,
            settings.mlp_up_size,
            bias=settings.bias_in_mlp,
            dtype=construction.dtype,
            tensor_parallel=construction.tensor_parallel,
        )
        self.linear2 = row_linear(settings.mlp_down_size, construction, bias=settings.bias_in_mlp)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the MLP's output, whole or partial as ``linear2`` gives it."""
        wide = self.linear1(hidden)
        if self.is_gated:
            # This rank's rows of linear1 are [up, gate].
            up, gate = wide.chunk(2, dim=-1)
            return self.linear2(up * F.silu(gate))
        return self.linear2(F.gelu(wide, approximate=self.approximation))


def row_linear(
    input_size: int, construction: Construction, *, bias: bool
) -> PartialRowLinear | ReducedRowLinear:
    """Return the matrix that ends a branch: with the parallel residual the block does the sum."""
    settings = construction.settings
    if settings.gpt_j_residual:
        return PartialRowLinear(
            input_size,
            settings.hidden_size,
            bias=bias,
            dtype=construction.dtype,
            tensor_parallel=construction.tensor_parallel,
            multiplicity=settings.tp_bias_multiplicity,
        )
    return ReducedRowLinear(
        input_size,
        settings.hidden_size,
        bias=bias,
        dtype=construction.dtype,
        tensor_parallel=construction.tensor_parallel,
    )
