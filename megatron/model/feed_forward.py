"""The MLP of a block, plain or gated."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from megatron.model.construction import Construction
from megatron.model.parallel_layers import ColumnLinear, PartialRowLinear, ReducedRowLinear

__all__ = ["FeedForward", "row_linear"]

# Of the plain MLP's whole width, or of a gated one's second half.
_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "softsign": F.softsign,
    "swish": F.silu,
    "silu": F.silu,
    "mish": F.mish,
    "geglu": F.gelu,
    "reglu": F.relu,
    "swiglu": F.silu,
    "bilinear": lambda gate: gate,
    "glu": torch.sigmoid,
}


class FeedForward(torch.nn.Module):
    """Widen, activate, narrow."""

    def __init__(self, construction: Construction) -> None:
        super().__init__()
        settings = construction.settings
        self.is_gated = settings.is_gated
        self.activate = _FUNCTIONS[settings.activation]
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
            return self.linear2(up * self.activate(gate))
        return self.linear2(self.activate(wide))


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
