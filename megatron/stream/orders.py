"""The endless order in which one dataset's samples are consumed.

First comes the *head*, as NeoX would read the dataset in a run of the length first asked for. After
it come tail blocks 1, 2, ...: each one pass over the same documents, shuffled from a seed of its
own, all samples used. A block depends on the seed and its number alone, never on how long a run was
meant to be, so an order can be continued for ever without changing what came before. An order
without a head begins with block 1.
"""

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.stream.indexed_dataset import IndexedDataset

__all__ = ["Occurrences", "Order", "TailBlocks", "TokenSpans", "tail_seed"]

_TAIL_BLOCKS_IN_MEMORY = 4
_LABEL_PADDING = -100  # not learned
_Maps = TypeVar("_Maps")


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


@dataclass(frozen=True)
class Occurrences:
    """Where documents are read: one entry per document and sample, by ascending position."""

    position: NDArray[np.int64]  # of the order
    block: NDArray[np.int64]
    sample: NDArray[np.int64]  # row of the block
    epoch: NDArray[np.int64]  # the how-manieth pass over the document this is, from 1
    document: NDArray[np.int64]
    start: NDArray[np.int64]  # tokens from the document's begin
    length: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.position)

    def at(self, where: NDArray[Any]) -> "Occurrences":
        """Return chosen entries, by mask or by index."""
        return Occurrences(**{name: column[where] for name, column in vars(self).items()})

    @classmethod
    def joined(cls, parts: list["Occurrences"]) -> "Occurrences":
        """Return the entries of all parts in order of their positions."""
        if not parts:
            return cls(*(np.zeros(0, dtype=np.int64) for _ in range(7)))
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])
        }
        together = cls(**columns)
        return together.at(np.argsort(together.position, kind="stable"))


class TailBlocks(Generic[_Maps]):
    """Tail blocks 1, 2, ..., computed when first asked for; the last few are kept.

    Args:
        maps: computes a block.
        length: samples in every block; or, if blocks differ, what tells those of one. Then all
            blocks up to a position must be computed to find it.
    """

    def __init__(self, maps: Callable[[int], _Maps], length: int | Callable[[_Maps], int]) -> None:
        self._maps = maps
        self._length = length
        self._ends: list[int] = [0]  # positions in the tail; used if lengths differ
        self._kept: OrderedDict[int, _Maps] = OrderedDict()
        self._lock = threading.RLock()

    def block(self, number: int) -> _Maps:
        """Return the maps of block ``number``."""
        with self._lock:
            maps = self._kept.get(number)
            if maps is None:
                maps = self._maps(number)
                self._kept[number] = maps
                if len(self._kept) > _TAIL_BLOCKS_IN_MEMORY:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end(number)
            return maps

    def find(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the block and the index within it of positions in the tail, counted from 0.

        Negative positions give no meaningful answer.
        """
        if not callable(self._length):
            block, index = np.divmod(positions, self._length)
            return block + 1, index
        ends = self._ends_beyond(int(positions.max(initial=-1)))
        block = np.maximum(np.searchsorted(ends, positions, side="right"), 1)
        return block, positions - ends[block - 1]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, range, int]]:
        """Yield (block, indices within it, position of its index 0) of a range of positions."""
        while start < stop:
            blocks, indices = self.find(np.array([start], dtype=np.int64))
            block, index = int(blocks[0]), int(indices[0])
            length = (
                self._length if isinstance(self._length, int) else self._length(self.block(block))
            )
            end = min(length, index + stop - start)
            yield block, range(index, end), start - index
            start += end - index

    def _ends_beyond(self, position: int) -> NDArray[np.int64]:
        assert callable(self._length)  # noqa: S101 - the callers have looked
        with self._lock:
            while self._ends[-1] <= position:
                self._ends.append(self._ends[-1] + self._length(self.block(len(self._ends))))
            return np.array(self._ends, dtype=np.int64)


class Order(ABC):
    """Samples of some documents of a dataset, endless.

    Args:
        dataset: where the tokens are.
        labels: parallel dataset of labels, if samples have them.
        seq_length: tokens a sample consumes; it has one more.
    """

    def __init__(
        self, dataset: IndexedDataset, seq_length: int, labels: IndexedDataset | None = None
    ) -> None:
        self.dataset = dataset
        self.labels = labels
        self.seq_length = seq_length

    @property
    @abstractmethod
    def head_length(self) -> int:
        """Positions in the head: NeoX's length of the dataset; 0 without a head."""

    @abstractmethod
    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the block (0: head) and the block's row at each position.

        Raises:
            ValueError: a position is negative.
        """

    @abstractmethod
    def spans(self, block: NDArray[np.int64], sample: NDArray[np.int64]) -> TokenSpans:
        """Return the spans of documents that make up samples found by :meth:`locate`."""

    @abstractmethod
    def epochs(self, block: int) -> range:
        """Return which passes over the documents a block consists of, the first being 1.

        The passes of a head are shuffled together.
        """

    @abstractmethod
    def find(self, documents: range, positions: range) -> Occurrences:
        """Return where in a range of positions any of some consecutive documents is read."""

    def first_known(self, documents: range, positions: range) -> int | None:
        """Return where documents are read first, if that is known without a search."""
        del documents, positions
        return None

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
            sample: row of the block.
            out: contiguous, shape (any, seq_length + 1), in the dataset's storage type.
            rows: one row per sample.

        Raises:
            DatasetError: the maps do not give seq_length + 1 tokens for every packed sample.
        """
        self._copy(self.dataset, self.spans(block, sample), out, rows, padding=0)

    def read_labels(
        self,
        block: NDArray[np.int64],
        sample: NDArray[np.int64],
        out: NDArray[Any],
        rows: NDArray[np.int64],
    ) -> None:
        """Copy the labels, -100 where a sample is padded, like :meth:`read`.

        Raises:
            ValueError: the samples have no labels.
        """
        if self.labels is None:
            raise ValueError(f"{self.dataset.prefix}: its samples have no labels")
        self._copy(self.labels, self.spans(block, sample), out, rows, padding=_LABEL_PADDING)

    @property
    def is_padded(self) -> bool:
        """Whether samples may have fewer tokens than asked for, and are padded."""
        return False

    def _copy(
        self,
        source: IndexedDataset,
        spans: TokenSpans,
        out: NDArray[Any],
        rows: NDArray[np.int64],
        *,
        padding: int,
    ) -> None:
        width = self.seq_length + 1
        stops = np.zeros(len(spans) + 1, dtype=np.int64)
        np.cumsum(spans.length, out=stops[1:])
        borders = stops[np.searchsorted(spans.row, np.arange(len(rows) + 1))]
        lengths = np.diff(borders)
        is_short = lengths != width
        if is_short.any():
            self._require_padded(lengths[is_short])
            out[rows[is_short]] = padding
        # Where a span goes: its sample's row, and what of the sample is before it.
        target = stops[:-1] + (rows * width - borders[:-1])[spans.row]
        itemsize = source.dtype.itemsize
        source.tokens.gather(
            source.pointers[spans.document] + spans.start * itemsize,
            target * itemsize,
            spans.length * itemsize,
            out,
        )

    def _require_padded(self, lengths: NDArray[np.int64]) -> None:
        if self.is_padded and int(lengths.max()) <= self.seq_length + 1:
            return
        raise DatasetError(
            f"{self.dataset.prefix}: a sample has {self.seq_length + 1} tokens, but the index maps "
            f"give {lengths[0]} for one of them; delete the dataset's *_indexmap_* files and start "
            "again"
        )


def in_row_order(parts: list[TokenSpans]) -> TokenSpans:
    """Return spans of different samples together, ordered by sample."""
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
