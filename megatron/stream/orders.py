"""The endless order in which one dataset's samples are consumed.

The head is NeoX's index maps. It ends one sample early, since NeoX never reaches the last shuffled
sample. After it come tail blocks 1, 2, ...: each one epoch of the same documents (or the fewest
epochs that give a sample), shuffled from a seed of its own, all samples used. A block depends on
the seed and its number alone, never on how long a run was meant to be, so an order can be
continued for ever without changing what came before.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.stream.grouping import groups
from megatron.stream.index_maps import PackedMaps, PackedShape
from megatron.stream.indexed_dataset import IndexedDataset

__all__ = ["PackedOrder", "TokenSpans", "tail_seed"]

_TAIL_BLOCKS_IN_MEMORY = 4


def tail_seed(seed: int, block: int) -> int:
    """Return the seed of tail block ``block`` (from 1) of an order with ``seed``."""
    return int(np.random.SeedSequence([seed, block]).generate_state(1)[0])


@dataclass(frozen=True)
class TokenSpans:
    """The documents that samples are made of, sample by sample and in reading order."""

    row: NDArray[np.int64]  # which of the samples asked for
    document: NDArray[np.int64]
    start: NDArray[np.int64]  # tokens from the document's begin
    length: NDArray[np.int64]  # tokens, at least 1

    def __len__(self) -> int:
        return len(self.row)


class PackedOrder:
    """Packed samples of some documents of a dataset, endless.

    Args:
        dataset: where the tokens are.
        head: NeoX's index maps.
        tail_shape: size of every tail block.
        tail_maps: computes the maps of tail block k (from 1).
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        head: PackedMaps,
        tail_shape: PackedShape,
        tail_maps: Callable[[int], PackedMaps],
    ) -> None:
        self.dataset = dataset
        self.head = head
        self.tail_shape = tail_shape
        self._tail_maps = tail_maps
        self._tail: OrderedDict[int, PackedMaps] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def head_length(self) -> int:
        """Positions in the head: NeoX's length of the dataset."""
        return max(0, self.head.num_samples - 1)

    def block(self, number: int) -> PackedMaps:
        """Return the maps of a block; tail blocks are computed when first asked for."""
        if number == 0:
            return self.head
        with self._lock:
            maps = self._tail.get(number)
            if maps is None:
                maps = self._tail_maps(number)
                self._tail[number] = maps
                if len(self._tail) > _TAIL_BLOCKS_IN_MEMORY:
                    self._tail.popitem(last=False)
            else:
                self._tail.move_to_end(number)
            return maps

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the block (0: head) and the row of its ``sample_idx`` at each position.

        Raises:
            ValueError: a position is negative.
        """
        if len(positions) and int(positions.min()) < 0:
            raise ValueError(f"positions must be >= 0, got {positions.min()}")
        beyond = positions - self.head_length
        in_head = beyond < 0
        if in_head.all():
            sample = self.head.shuffle_idx[positions].astype(np.int64)
            return np.zeros(len(positions), dtype=np.int64), sample
        block, index = np.divmod(beyond, self.tail_shape.num_samples)
        block = np.where(in_head, 0, block + 1)
        index = np.where(in_head, positions, index)
        sample = np.empty(len(positions), dtype=np.int64)
        for number, where in groups(block):
            sample[where] = self.block(number).shuffle_idx[index[where]]
        return block, sample

    def spans(self, block: NDArray[np.int64], sample: NDArray[np.int64]) -> TokenSpans:
        """Return the spans of documents that make up samples found by :meth:`locate`."""
        parts = []
        for number, where in groups(block):
            part = self._block_spans(number, sample[where])
            if len(where) == len(block):
                return part
            parts.append(TokenSpans(where[part.row], part.document, part.start, part.length))
        return _in_row_order(parts)

    def read(
        self,
        block: NDArray[np.int64],
        sample: NDArray[np.int64],
        out: NDArray[Any],
        rows: NDArray[np.int64],
    ) -> None:
        """Copy the tokens of samples found by :meth:`locate` into ``out[rows]``.

        Args:
            block: block of each sample.
            sample: row of the block's ``sample_idx``.
            out: contiguous, shape (any, seq_length + 1), in the dataset's storage type.
            rows: one row per sample.

        Raises:
            DatasetError: the maps do not give seq_length + 1 tokens for every sample.
        """
        spans = self.spans(block, sample)
        width = self.tail_shape.seq_length + 1
        stops = np.cumsum(spans.length)
        row_stops = stops[np.searchsorted(spans.row, np.arange(len(sample)), side="right") - 1]
        expected = np.arange(1, len(sample) + 1) * width
        if not np.array_equal(row_stops, expected):
            wrong = int(np.flatnonzero(row_stops != expected)[0])
            raise DatasetError(
                f"{self.dataset.prefix}: a sample has {width} tokens, but the index maps give "
                f"{row_stops[wrong] - wrong * width} for one of them; delete the dataset's "
                "*_indexmap_* files and start again"
            )
        itemsize = self.dataset.dtype.itemsize
        target = stops - spans.length + (rows[spans.row] - spans.row) * width
        self.dataset.tokens.gather(
            self.dataset.pointers[spans.document] + spans.start * itemsize,
            target * itemsize,
            spans.length * itemsize,
            out,
        )

    def _block_spans(self, number: int, sample: NDArray[np.int64]) -> TokenSpans:
        maps = self.block(number)
        begin = maps.sample_idx[sample].astype(np.int64)
        end = maps.sample_idx[sample + 1].astype(np.int64)
        num_spans = end[:, 0] - begin[:, 0] + 1
        row = np.repeat(np.arange(len(sample)), num_spans)
        stops = np.cumsum(num_spans)
        starts = stops - num_spans
        document = maps.doc_idx[np.arange(len(row)) + (begin[:, 0] - starts)[row]].astype(np.int64)
        first_token = np.zeros(len(row), dtype=np.int64)
        first_token[starts] = begin[:, 1]
        stop_token = self.dataset.sizes[document].astype(np.int64)
        stop_token[stops - 1] = end[:, 1] + 1  # the end's token belongs to both samples
        length = stop_token - first_token
        if length.all():
            return TokenSpans(row, document, first_token, length)
        filled = np.flatnonzero(length)  # empty documents are no part of a sample
        return TokenSpans(row[filled], document[filled], first_token[filled], length[filled])


def _in_row_order(parts: list[TokenSpans]) -> TokenSpans:
    if not parts:
        return TokenSpans(*(np.zeros(0, dtype=np.int64) for _ in range(4)))
    row = np.concatenate([part.row for part in parts])
    order = np.argsort(row, kind="stable")
    return TokenSpans(
        row=row[order],
        document=np.concatenate([part.document for part in parts])[order],
        start=np.concatenate([part.start for part in parts])[order],
        length=np.concatenate([part.length for part in parts])[order],
    )
