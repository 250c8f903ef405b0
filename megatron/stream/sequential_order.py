"""Preshuffled data read row by row: a document is a sample, and the file is the order."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.stream.grouping import groups
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.orders import Occurrences, Order, TailBlocks, TokenSpans
from megatron.stream.scans import indices_of

__all__ = ["SequentialOrder", "has_rows_alone", "require_rows"]


def require_rows(dataset: IndexedDataset, documents: range, seq_length: int) -> None:
    """Check that every document is one sample.

    Raises:
        DatasetError: one has more or fewer tokens.
    """
    sizes = dataset.sizes[documents.start : documents.stop]
    is_other = sizes != seq_length + 1
    if is_other.any():
        first = int(is_other.argmax())
        raise DatasetError(
            f"{dataset.prefix}: data_order: sequential reads rows of seq_length + 1 = "
            f"{seq_length + 1} tokens, but document {documents.start + first} has {sizes[first]} "
            f"({int(is_other.sum())} of {len(sizes)} have another number)"
        )


def has_rows_alone(dataset: IndexedDataset, seq_length: int) -> bool:
    """Whether every document is one sample, as in preshuffled data."""
    width, size_bytes = seq_length + 1, dataset.index.size_bytes
    if not len(dataset) or size_bytes != len(dataset) * width * dataset.dtype.itemsize:
        return False  # most data, without reading all sizes
    return bool((dataset.sizes == width).all())


class SequentialOrder(Order):
    """Documents of seq_length + 1 tokens each: first in file order, then shuffled pass by pass.

    Args:
        dataset: where the rows are.
        documents: which of them.
        seq_length: tokens a sample consumes.
        has_head: False if the order begins with tail block 1.
        tail: rows shuffled, a pass a block.
        labels: parallel dataset of labels, if samples have them.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: range,
        seq_length: int,
        *,
        has_head: bool,
        tail: TailBlocks[NDArray[Any]],
        labels: IndexedDataset | None = None,
    ) -> None:
        super().__init__(dataset, seq_length, labels)
        self.documents = documents
        self.tail = tail
        self._head_length = len(documents) if has_head else 0

    @property
    def head_length(self) -> int:
        return self._head_length

    def epochs(self, block: int) -> range:
        epoch = block + (self._head_length > 0)
        return range(epoch, epoch + 1)

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if len(positions) and int(positions.min()) < 0:
            raise ValueError(f"positions must be >= 0, got {positions.min()}")
        beyond = positions - self._head_length
        in_head = beyond < 0
        if in_head.all():
            return np.zeros(len(positions), dtype=np.int64), positions
        block, index = self.tail.find(beyond)
        block = np.where(in_head, 0, block)
        sample = positions.copy()
        for number, where in groups(block):
            if number > 0:
                sample[where] = self.tail.block(number)[index[where]]
        return block, sample

    def spans(self, block: NDArray[np.int64], sample: NDArray[np.int64]) -> TokenSpans:
        return TokenSpans(
            row=np.arange(len(sample)),
            document=self.documents.start + sample,
            start=np.zeros(len(sample), dtype=np.int64),
            length=np.full(len(sample), self.seq_length + 1, dtype=np.int64),
        )

    def find(self, documents: range, positions: range) -> Occurrences:
        first = self.documents.start
        rows = np.arange(
            max(documents.start, first) - first, min(documents.stop, self.documents.stop) - first
        )
        if not len(rows):
            return Occurrences.joined([])
        head = self._head_length
        in_head = rows[(rows >= positions.start) & (rows < min(positions.stop, head))]
        parts = [self._occurrences(0, in_head, in_head)]
        start = max(positions.start - head, 0)
        for block, indices, first_position in self.tail.pieces(start, positions.stop - head):
            shuffled = self.tail.block(block)
            found = indices_of(shuffled, rows, indices, len(self.documents))
            sample = shuffled[found].astype(np.int64)
            parts.append(self._occurrences(block, head + first_position + found, sample))
        return Occurrences.joined(parts)

    def first_known(self, documents: range, positions: range) -> int | None:
        """Return where in the head documents are read first; None if not there."""
        first = max(documents.start - self.documents.start, positions.start)
        stop = min(documents.stop - self.documents.start, positions.stop, self._head_length)
        return first if first < stop else None

    def _occurrences(
        self, block: int, position: NDArray[np.int64], sample: NDArray[np.int64]
    ) -> Occurrences:
        blocks = np.full(len(sample), block, dtype=np.int64)
        spans = self.spans(blocks, sample)
        return Occurrences(
            position=position,
            block=blocks,
            sample=sample,
            epoch=np.full(len(sample), self.epochs(block).start, dtype=np.int64),
            document=spans.document,
            start=spans.start,
            length=spans.length,
        )
