"""Cross entropy over a vocabulary that is divided over tensor ranks."""

from typing import Any

import torch
import torch.distributed

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
    """Softmax and its gradient in one float32 tensor, passed over as rarely as possible.

    megatron-core's, which also takes a global group, passes over it half as often again.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, tensor_parallel: TensorParallel
    ) -> torch.Tensor:
        largest = logits.amax(dim=-1).float()
        _all_reduce(largest, torch.distributed.ReduceOp.MAX, tensor_parallel)
        scores = logits - largest.unsqueeze(-1)  # float32, whatever the logits are
        rows = logits.shape[-1]
        local_labels = labels - tensor_parallel.rank * rows
        is_elsewhere = (local_labels < 0) | (local_labels >= rows)
        local_labels = local_labels.masked_fill_(is_elsewhere, 0).unsqueeze(-1)
        predicted = scores.gather(-1, local_labels).squeeze(-1).masked_fill_(is_elsewhere, 0.0)
        exponentials = scores.exp_()
        total = exponentials.sum(dim=-1)
        _all_reduce(predicted, torch.distributed.ReduceOp.SUM, tensor_parallel)
        _all_reduce(total, torch.distributed.ReduceOp.SUM, tensor_parallel)
        ctx.save_for_backward(exponentials, total, is_elsewhere, local_labels)
        ctx.logits_dtype = logits.dtype
        return total.log() - predicted

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        exponentials, total, is_elsewhere, local_labels = ctx.saved_tensors
        scores_gradient = exponentials.mul_((gradient / total).unsqueeze(-1))
        of_labels = -gradient.masked_fill(is_elsewhere, 0.0)
        scores_gradient.scatter_add_(-1, local_labels, of_labels.unsqueeze(-1))
        return scores_gradient.to(ctx.logits_dtype), None, None


def _all_reduce(tensor: torch.Tensor, operation: Any, tensor_parallel: TensorParallel) -> None:
    if tensor_parallel.size > 1:
        torch.distributed.all_reduce(tensor, op=operation, group=tensor_parallel.group)
