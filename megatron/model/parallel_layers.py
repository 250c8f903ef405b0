"""Embedding and linear layers over tensor ranks, on megatron-core's.

megatron-core provides parameters, their tensor-parallel marks (DeepSpeed's gradient norm reads
them) and the communication. Three things differ here: with one rank nothing needs
torch.distributed; a state dict holds no `_extra_state`; and the row-parallel layer comes in two
kinds, since NeoX's parallel residual adds attention and MLP up before the one all-reduce.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron.model.light_import import light_import

with light_import():
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        linear_with_grad_accumulation_and_async_allreduce,
        reduce_from_tensor_model_parallel_region,
    )

__all__ = [
    "ColumnLinear",
    "PartialRowLinear",
    "ReducedRowLinear",
    "TensorParallel",
    "VocabularyEmbedding",
    "column_product",
    "mark_divided",
    "sum_over_ranks",
]

if not torch.cuda.is_available():
    # megatron-core would advise on the order of CUDA streams.
    linear_with_grad_accumulation_and_async_allreduce.warned = True


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among the ranks that share every layer's tensors."""

    group: Any = None  # torch.distributed.ProcessGroup; None only for a single rank
    size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"tensor rank {self.rank} is not in a group of {self.size}")
        if self.group is None and self.size != 1:
            raise ValueError(f"tensor-parallel size {self.size} needs a process group")

    @classmethod
    def of_group(cls, group: Any) -> "TensorParallel":
        """Return this process's place in a torch.distributed process group."""
        return cls(group, group.size(), group.rank())


def sum_over_ranks(partial: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
    """Return the sum of all ranks' ``partial``, which may be overwritten; gradients pass."""
    if tensor_parallel.size == 1:
        return partial
    # megatron-core reduces in place, and loses the result of a tensor that isn't contiguous.
    return reduce_from_tensor_model_parallel_region(
        partial.contiguous(), group=tensor_parallel.group
    )


def column_product(
    hidden: torch.Tensor, weight: torch.Tensor, tensor_parallel: TensorParallel
) -> torch.Tensor:
    """Return ``hidden @ weight.T`` for a weight whose rows are divided over the ranks."""
    if tensor_parallel.size == 1:
        return F.linear(hidden, weight)
    return linear_with_grad_accumulation_and_async_allreduce(
        hidden,
        weight,
        None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=True,
        sequence_parallel=False,
        tp_group=tensor_parallel.group,
    )


class VocabularyEmbedding(VocabParallelEmbedding):
    """Token embedding; each rank holds a range of rows."""

    def __init__(
        self,
        num_rows: int,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        tensor_parallel: TensorParallel,
    ) -> None:
        super().__init__(
            num_rows,
            hidden_size,
            init_method=_left_empty,
            config=_construction(dtype),
            tp_group=tensor_parallel.group,
        )
        self.tensor_parallel = tensor_parallel
        mark_divided(self.weight, dim=0)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.tensor_parallel.size == 1:
            return F.embedding(tokens, self.weight)
        return super().forward(tokens)


class ColumnLinear(ColumnParallelLinear):
    """Linear layer whose output is divided over the ranks; the input is whole on each."""

    get_extra_state = torch.nn.Module.get_extra_state

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        tensor_parallel: TensorParallel,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            bias=bias,
            config=_construction(dtype),
            init_method=_left_empty,
            tp_group=tensor_parallel.group,
        )
        self.tensor_parallel = tensor_parallel
        mark_divided(self.weight, dim=0)
        _zero(self.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.tensor_parallel.size == 1:
            return F.linear(hidden, self.weight, self.bias)
        return super().forward(hidden)[0]


class _RowLinear(RowParallelLinear):
    """Linear layer whose input is divided over the ranks; the bias is the same on each."""

    get_extra_state = torch.nn.Module.get_extra_state

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        tensor_parallel: TensorParallel,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            config=_construction(dtype),
            init_method=_left_empty,
            tp_group=tensor_parallel.group,
        )
        self.tensor_parallel = tensor_parallel
        mark_divided(self.weight, dim=1)
        _zero(self.bias)


class ReducedRowLinear(_RowLinear):
    """Row-parallel layer that ends in an all-reduce and then counts its bias once."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.tensor_parallel.size == 1:
            return F.linear(hidden, self.weight, self.bias)
        whole = sum_over_ranks(F.linear(hidden, self.weight), self.tensor_parallel)
        return whole if self.bias is None else whole + self.bias


class PartialRowLinear(_RowLinear):
    """Row-parallel layer whose output the caller still has to sum over the ranks.

    Each rank adds its share of ``multiplicity`` biases, so that the sum holds that many. The
    gradient is that of one copy, as in NeoX, where every rank's copy gets it (design §5).
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        tensor_parallel: TensorParallel,
        multiplicity: int,
    ) -> None:
        super().__init__(
            input_size, output_size, bias=bias, dtype=dtype, tensor_parallel=tensor_parallel
        )
        self.multiplicity = multiplicity

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        bias = self.bias
        if bias is not None and self.multiplicity != self.tensor_parallel.size:
            bias = _ScaledForward.apply(bias, self.multiplicity / self.tensor_parallel.size)
        return F.linear(hidden, self.weight, bias)


class _ScaledForward(torch.autograd.Function):
    """Multiply on the way forward, pass the gradient on as it is."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        return tensor * factor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _construction(dtype: torch.dtype) -> ModelParallelConfig:
    """Parameters are allocated on the CPU and left empty: `initialisation` fills the matrices."""
    return ModelParallelConfig(
        use_cpu_initialization=True, perform_initialization=False, params_dtype=dtype
    )


_left_empty: Callable[[torch.Tensor], None] = lambda tensor: None  # noqa: E731 - never called


def mark_divided(weight: torch.nn.Parameter, *, dim: int) -> None:
    """Say that tensor ranks hold parts of ``weight``: DeepSpeed's gradient norm asks."""
    weight.tensor_model_parallel = True
    weight.partition_dim = dim
    weight.partition_stride = 1


def _zero(bias: torch.nn.Parameter | None) -> None:
    if bias is not None:
        with torch.no_grad():
            bias.zero_()
