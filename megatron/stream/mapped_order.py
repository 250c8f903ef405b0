"""Orders computed from index maps: packed samples, and documents that are not cut."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megatron.stream.grouping import groups
from megatron.stream.index_maps import IndexMaps
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.orders import Occurrences, Order, TailBlocks, TokenSpans, in_row_order
from megatron.stream.scans import indices_between, indices_of, ranks, rows_containing

__all__ = ["MappedOrder"]


class MappedOrder(Order):
    """Samples of some documents of a dataset, in the order that index maps give.

    NeoX never reaches the last shuffled sample of its maps, so a head ends one sample early.

    Args:
        dataset: where the tokens are.
        seq_length: tokens a sample consumes.
        head: NeoX's index maps; None if the order begins with tail block 1.
        tail: the blocks after it.
        head_epochs: passes over the documents that the head consists of.
        tail_epochs: the same of each tail block.
        is_packed: every sample has seq_length + 1 tokens; otherwise more are cut off, and what is
            missing is padded.
        labels: parallel dataset of labels, if samples have them.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        seq_length: int,
        *,
        head: IndexMaps | None,
        tail: TailBlocks[IndexMaps],
        head_epochs: int,
        tail_epochs: int = 1,
        is_packed: bool = True,
        labels: IndexedDataset | None = None,
    ) -> None:
        super().__init__(dataset, seq_length, labels)
        self.head = head
        self.tail = tail
        self._head_length = 0 if head is None else max(0, head.num_samples - 1)
        self._head_epochs = head_epochs
        self._tail_epochs = tail_epochs
        self._is_packed = is_packed

    @property
    def head_length(self) -> int:
        return self._head_length

    @property
    def is_padded(self) -> bool:
        return not self._is_packed

    def block(self, number: int) -> IndexMaps:
        """Return the maps of a block; tail blocks are computed when first asked for."""
        if number > 0:
            return self.tail.block(number)
        if self.head is None:
            raise ValueError(f"{self.dataset.prefix}: this order has no head")
        return self.head

    def epochs(self, block: int) -> range:
        if block == 0:
            return range(1, self._head_epochs + 1)
        first = 1 + self._head_epochs + (block - 1) * self._tail_epochs
        return range(first, first + self._tail_epochs)

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if len(positions) and int(positions.min()) < 0:
            raise ValueError(f"positions must be >= 0, got {positions.min()}")
        beyond = positions - self._head_length
        in_head = beyond < 0
        if self.head is not None and in_head.all():
            sample = self.head.shuffle_idx[positions].astype(np.int64)
            return np.zeros(len(positions), dtype=np.int64), sample
        block, index = self.tail.find(beyond)
        block = np.where(in_head, 0, block)
        index = np.where(in_head, positions, index)
        sample = np.empty(len(positions), dtype=np.int64)
        for number, where in groups(block):
            sample[where] = self.block(number).shuffle_idx[index[where]]
        return block, sample

    def spans(self, block: NDArray[np.int64], sample: NDArray[np.int64]) -> TokenSpans:
        parts = []
        for number, where in groups(block):
            part, _ = self._block_spans(self.block(number), sample[where])
            if len(where) == len(block):
                return part
            parts.append(TokenSpans(where[part.row], part.document, part.start, part.length))
        return in_row_order(parts)

    def find(self, documents: range, positions: range) -> Occurrences:
        return Occurrences.joined(
            [
                self._find_in_block(documents, block, indices, first_position)
                for block, indices, first_position in self._pieces(positions)
            ]
        )

    def _pieces(self, positions: range) -> Iterator[tuple[int, range, int]]:
        """Yield (block, indices within it, position of its index 0) of a range."""
        start, stop, head = positions.start, positions.stop, self._head_length
        if start < min(stop, head):
            yield 0, range(start, min(stop, head)), 0
        for block, indices, first in self.tail.pieces(max(start - head, 0), stop - head):
            yield block, indices, first + head

    def _find_in_block(
        self, documents: range, block: int, indices: range, first_position: int
    ) -> Occurrences:
        maps = self.block(block)
        places = indices_between(maps.doc_idx, documents.start, documents.stop)
        if not len(places):
            return Occurrences.joined([])
        rows = rows_containing(maps.sample_idx, places)
        found = indices_of(maps.shuffle_idx, rows, indices, maps.num_samples)
        sample = maps.shuffle_idx[found].astype(np.int64)
        spans, place = self._block_spans(maps, sample)
        passes = self.epochs(block)
        # A block's first document may be read once more, where it ends the block's last sample.
        epoch = np.minimum(passes.start + ranks(maps.doc_idx[places]), passes.stop - 1)
        wanted = (spans.document >= documents.start) & (spans.document < documents.stop)
        return Occurrences(
            position=first_position + found[spans.row],
            block=np.full(len(spans), block, dtype=np.int64),
            sample=sample[spans.row],
            epoch=epoch[np.minimum(np.searchsorted(places, place), len(places) - 1)],
            document=spans.document,
            start=spans.start,
            length=spans.length,
        ).at(wanted)

    def _block_spans(
        self, maps: IndexMaps, sample: NDArray[np.int64]
    ) -> tuple[TokenSpans, NDArray[np.int64]]:
        """Return the spans of samples of one block, and each one's index into its ``doc_idx``."""
        begin = maps.sample_idx[sample].astype(np.int64)
        end = maps.sample_idx[sample + 1].astype(np.int64)
        num_spans = end[:, 0] - begin[:, 0] + 1
        row = np.repeat(np.arange(len(sample)), num_spans)
        stops = np.cumsum(num_spans)
        starts = stops - num_spans
        place = np.arange(len(row)) + (begin[:, 0] - starts)[row]
        document = maps.doc_idx[place].astype(np.int64)
        first_token = np.zeros(len(row), dtype=np.int64)
        first_token[starts] = begin[:, 1]
        stop_token = self.dataset.sizes[document].astype(np.int64)
        # The end's token belongs to both samples; an empty document has none.
        stop_token[stops - 1] = np.minimum(end[:, 1] + 1, stop_token[stops - 1])
        length = stop_token - first_token
        if not self._is_packed:
            length = self._cut_off(length, starts, row)
        if length.all():
            return TokenSpans(row, document, first_token, length), place
        filled = np.flatnonzero(length)  # empty documents are no part of a sample
        spans = TokenSpans(row[filled], document[filled], first_token[filled], length[filled])
        return spans, place[filled]

    def _cut_off(
        self, length: NDArray[np.int64], starts: NDArray[np.int64], row: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Shorten spans to what is within the first seq_length + 1 tokens of their sample."""
        before = np.cumsum(length) - length
        before -= before[starts][row]
        cut: NDArray[np.int64] = np.clip(self.seq_length + 1 - before, 0, length)
        return cut
