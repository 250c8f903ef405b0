"""Cross entropy over a vocabulary that is divided over tensor ranks."""

from typing import Any

import torch
import torch.distributed

from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.model.parallel_layers import TensorParallel

__all__ = ["cross_entropy_loss", "token_losses"]


def cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    tensor_parallel: TensorParallel,
) -> torch.Tensor:
    """Return the mean loss of the tokens that count, one float32 number, equal on all ranks.

    The mean is that of one micro batch on one data-parallel rank, as in NeoX (spec/model.md §9);
    if no token counts it is NaN.

    Args:
        logits: this rank's part, (batch, sequence, vocabulary rows / ranks).
        labels: int64 token ids, (batch, sequence).
        loss_mask: float32 weights, (batch, sequence): 0 where a token does not count.
        tensor_parallel: the ranks that share the vocabulary.
    """
    weights = loss_mask.float()
    losses = token_losses(logits, labels, tensor_parallel)
    return (losses * weights).sum() / weights.sum()


def token_losses(
    logits: torch.Tensor, labels: torch.Tensor, tensor_parallel: TensorParallel
) -> torch.Tensor:
    """Return the loss of every token in float32, of the labels' shape."""
    return _TokenLosses.apply(logits, labels, tensor_parallel)


class _TokenLosses(torch.autograd.Function):
    """megatron-core's arithmetic with the group as an argument; its own takes a global one."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, tensor_parallel: TensorParallel
    ) -> torch.Tensor:
        core = VocabParallelCrossEntropy
        # The arithmetic is done in place, on a copy: callers may still want the logits.
        scores = logits.to(torch.float32, copy=True)
        scores, largest = core.calculate_logits_max(scores)
        _all_reduce(largest, torch.distributed.ReduceOp.MAX, tensor_parallel)
        rows = logits.shape[-1]
        first = tensor_parallel.rank * rows
        is_elsewhere, local_labels, predicted, total, exponentials = (
            core.calculate_predicted_logits(scores, labels, largest, first, first + rows)
        )
        _all_reduce(predicted, torch.distributed.ReduceOp.SUM, tensor_parallel)
        _all_reduce(total, torch.distributed.ReduceOp.SUM, tensor_parallel)
        probabilities, losses = core.calculate_cross_entropy_loss(exponentials, predicted, total)
        ctx.save_for_backward(probabilities, is_elsewhere, local_labels)
        ctx.logits_dtype = logits.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        core = VocabParallelCrossEntropy
        probabilities, is_elsewhere, local_labels = ctx.saved_tensors
        rows_2d, row_numbers, is_here, scores_gradient = core.prepare_gradient_calculation_operands(
            probabilities, is_elsewhere
        )
        scores_gradient = core.calculate_gradients(
            rows_2d, row_numbers, local_labels, is_here, scores_gradient, gradient
        )
        return scores_gradient.to(ctx.logits_dtype), None, None


def _all_reduce(tensor: torch.Tensor, operation: Any, tensor_parallel: TensorParallel) -> None:
    if tensor_parallel.size > 1:
        torch.distributed.all_reduce(tensor, op=operation, group=tensor_parallel.group)
