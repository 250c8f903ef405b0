"""One training step and one evaluation, the same for pipelines and for the sequential module."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed

from megatron.data.batch import broadcast_tokens, split_tokens
from megatron.data.loader import MicroBatchLoader
from megatron.engine.consumed import ConsumedDigests
from megatron.engine.distributed import ProcessGroups

__all__ = ["BatchFormat", "MicroBatchSource", "evaluate", "train_step"]


@dataclass(frozen=True)
class BatchFormat:
    """How tokens become a micro batch on this rank."""

    micro_batch_size: int
    seq_length: int  # tokens per row of inputs; a sample has one more
    storage_dtype: np.dtype[Any]
    has_labels: bool  # what is to be predicted is read beside the tokens
    eod: int | None  # the tokenizer's end-of-document id
    eod_mask_loss: bool  # no loss where the input token is the end of a document

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of what is read: tokens, or tokens and labels."""
        row = (self.seq_length + 1,)
        return (
            (self.micro_batch_size, 2, *row) if self.has_labels else (self.micro_batch_size, *row)
        )


class MicroBatchSource:
    """An endless iterator of ``(inputs, (labels, loss_mask))`` on this rank's device.

    Tensor rank 0 reads (its ``loader``); the other tensor ranks have none and receive its tokens.

    Attributes:
        position: stream position, over all ranks, that the next micro step begins at. Stages that
            never ask for a batch stay where they began.
        consumed: counts what this rank has read; None if it doesn't read or nothing is recorded.
    """

    def __init__(
        self,
        loader: MicroBatchLoader | None,
        batch_format: BatchFormat,
        groups: ProcessGroups,
        *,
        first_position: int,
        consumed: ConsumedDigests | None = None,
    ) -> None:
        self._loader = loader
        self.position = first_position
        self.consumed = consumed
        self._format = batch_format
        self._groups = groups

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        layout = self._format
        read = next(self._loader) if self._loader is not None else None
        if read is not None and self.consumed is not None:
            if layout.has_labels:
                self.consumed.add(read[:, 0], [read[:, 1]])
            else:
                self.consumed.add(read)
        self.position += layout.micro_batch_size * self._groups.topology.data_parallel_size
        tokens = broadcast_tokens(
            read,
            shape=layout.shape,
            dtype=layout.storage_dtype,
            group=self._groups.tensor if self._groups.topology.tensor_parallel_size > 1 else None,
            source_rank=self._groups.tensor_source,
            device=self._groups.device,
        )
        inputs, labels, loss_mask = split_tokens(
            tokens, eod=layout.eod, eod_mask_loss=layout.eod_mask_loss
        )
        return inputs, (labels, loss_mask)

    def close(self) -> None:
        """Stop the loader's threads."""
        if self._loader is not None:
            self._loader.close()


LossFunction = Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]


def train_step(
    engine: Any, batches: Iterator[Any], loss_function: LossFunction, groups: ProcessGroups
) -> float:
    """Take one optimizer step and return its loss, the same number on every rank.

    The loss is the mean over micro steps and data-parallel ranks of each micro batch's masked
    mean (spec/model.md §9).
    """
    if groups.topology.uses_pipeline_engine:
        # Middle stages never ask for a batch.
        return float(engine.train_batch(data_iter=batches))
    engine.train()
    losses = []
    for _ in range(engine.gradient_accumulation_steps()):
        inputs, labels = next(batches)
        loss = loss_function(engine(inputs), labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().float())
    return _mean_over_data_ranks(torch.stack(losses).mean(), groups)


def evaluate(
    engine: Any,
    batches: Iterator[Any],
    loss_function: LossFunction,
    groups: ProcessGroups,
    *,
    iterations: int,
    goes_on: Callable[[], bool] = lambda: True,
) -> float | None:
    """Return the mean loss over ``iterations`` global batches; nothing of the model changes.

    Args:
        engine: DeepSpeed's.
        batches: what is evaluated.
        loss_function: of logits and labels.
        groups: of this rank.
        iterations: number of global batches.
        goes_on: asked after each of them; False, on all ranks, ends the evaluation.

    Returns:
        None if it ended before the last batch.
    """
    losses: list[float] = []
    while len(losses) < iterations:
        if groups.topology.uses_pipeline_engine:
            losses.append(float(engine.eval_batch(batches)))
        else:
            losses.append(_sequential_loss(engine, batches, loss_function, groups))
        if not goes_on():
            break
    engine.train()
    return sum(losses) / len(losses) if len(losses) == iterations else None


def _sequential_loss(
    engine: Any, batches: Iterator[Any], loss_function: LossFunction, groups: ProcessGroups
) -> float:
    engine.eval()
    losses = []
    with torch.no_grad():
        for _ in range(engine.gradient_accumulation_steps()):
            inputs, labels = next(batches)
            losses.append(loss_function(engine(inputs), labels).float())
    return _mean_over_data_ranks(torch.stack(losses).mean(), groups)


def _mean_over_data_ranks(loss: torch.Tensor, groups: ProcessGroups) -> float:
    if groups.topology.data_parallel_size > 1:
        torch.distributed.all_reduce(loss, group=groups.data)
        loss = loss / groups.topology.data_parallel_size
    return float(loss)
