"""The endless sequence of samples of an order: positions in, tokens out, and the way back.

Positions are those of the order. Where a run consumes them is for segments to say.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron.stream.blending import Blend
from megatron.stream.explanations import (
    DocumentPart,
    SampleParts,
    named_tuples,
    sample_documents,
)
from megatron.stream.grouping import groups
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.order_description import OrderDescription
from megatron.stream.orders import Occurrences, Order, TokenSpans

__all__ = ["SampleRefs", "Stream", "StreamSpans"]


@dataclass(frozen=True)
class SampleRefs:
    """Which samples stand at the positions asked for, one entry each."""

    dataset: NDArray[np.int16]  # index into Stream.orders
    block: NDArray[np.int64]  # 0 is the head, 1 and on are tail blocks
    sample: NDArray[np.int64]  # row of the block


@dataclass(frozen=True)
class StreamSpans(TokenSpans):
    """What samples are made of, with the component that each span is of."""

    component: NDArray[np.int16]  # index into Stream.orders


class Stream:
    """Samples by position, endless: one dataset's order, or a blend of several.

    Args:
        description: what it is.
        orders: one per component.
        blend: how they are mixed; None for a single one.
    """

    def __init__(
        self, description: OrderDescription, orders: Sequence[Order], blend: Blend | None
    ) -> None:
        self.description = description
        self.orders = tuple(orders)
        self.blend = blend
        self.seq_length = description.seq_length
        self.dtype: np.dtype[Any] = np.result_type(*(order.dataset.dtype for order in orders))
        self._keys = [component.key for component in description.components]
        self._starts = np.array([one.start for one in description.components], dtype=np.int64)

    def __len__(self) -> int:
        """Return the length of NeoX's dataset; positions from there on are fine too."""
        return sum(order.head_length for order in self.orders)

    def __bool__(self) -> bool:
        """Return True: also a stream with an empty head goes on for ever."""
        return True

    @property
    def head_length(self) -> int:
        """Positions in the heads of all components."""
        return len(self)

    @property
    def has_labels(self) -> bool:
        """Whether every sample has labels of its own."""
        return all(order.labels is not None for order in self.orders)

    @property
    def label_dtype(self) -> np.dtype[Any]:
        """Return the type of labels; signed, as padding is negative whatever the labels are.

        Raises:
            ValueError: the samples have no labels.
        """
        return np.result_type(*(_label_dtype(order) for order in self.orders))

    def locate(self, positions: ArrayLike) -> SampleRefs:
        """Return the samples at ``positions``.

        Raises:
            ValueError: a position is negative.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if self.blend is None or len(self.orders) == 1:
            block, sample = self.orders[0].locate(positions + self._starts[0])
            return SampleRefs(np.zeros(len(positions), dtype=np.int16), block, sample)
        dataset, index = self.blend.locate(positions)
        block = np.empty(len(positions), dtype=np.int64)
        sample = np.empty(len(positions), dtype=np.int64)
        for number, where in groups(dataset):
            own = index[where] + self._starts[number]
            block[where], sample[where] = self.orders[number].locate(own)
        return SampleRefs(dataset, block, sample)

    def read(self, positions: ArrayLike) -> NDArray[Any]:
        """Return the tokens at ``positions``: shape (len(positions), seq_length + 1), storage type.

        Any number of threads may read at the same time.

        Raises:
            ValueError: a position is negative.
        """
        return self._read(positions, self.dtype, lambda order: (order.dataset.dtype, order.read))

    def read_labels(self, positions: ArrayLike) -> NDArray[Any]:
        """Return the labels at ``positions``, in the shape of :meth:`read`; -100 is not learned.

        Raises:
            ValueError: a position is negative, or the samples have no labels.
        """

        def labels(order: Order) -> tuple[np.dtype[Any], Callable[..., None]]:
            return _label_dtype(order), order.read_labels

        return self._read(positions, self.label_dtype, labels)

    def spans(self, positions: ArrayLike) -> StreamSpans:
        """Return the spans of documents that the samples at ``positions`` are made of."""
        return self._spans(self.locate(positions))

    def component_cursors(self, order_position: int) -> dict[str, int]:
        """Return each component's next position once the first ``order_position`` are consumed."""
        return {
            key: start + count
            for key, start, count in zip(
                self._keys, self._starts.tolist(), self._counts(order_position), strict=True
            )
        }

    def explain(self, positions: ArrayLike) -> list[SampleParts]:
        """Return what the samples at ``positions`` are and what they are made of.

        Raises:
            ValueError: a position is negative.
        """
        positions = np.asarray(positions, dtype=np.int64)
        refs = self.locate(positions)
        documents: list[tuple[DocumentPart, ...]] = [()] * len(positions)
        for number, rows in groups(refs.dataset):
            found = sample_documents(self.orders[number], refs.block[rows], refs.sample[rows])
            if len(rows) == len(positions):
                documents = found
                break
            for row, parts in zip(rows.tolist(), found, strict=True):
                documents[row] = parts
        components, blocks = refs.dataset.tolist(), refs.block.tolist()
        places = list(zip(components, blocks, strict=True))
        epochs = {place: self.orders[place[0]].epochs(place[1]) for place in set(places)}
        return named_tuples(
            SampleParts,
            positions.tolist(),
            components,
            [self._keys[component] for component in components],
            [self.orders[component].dataset.prefix for component in components],
            blocks,
            [epochs[place] for place in places],
            refs.sample.tolist(),
            documents,
            self._padding(documents),
        )

    def positions_of_document(self, component: int, document: int, positions: range) -> Occurrences:
        """Return where within a range of positions a document is read, by ascending position.

        It is found by a scan of the index maps of every block that the range touches.

        Args:
            component: index into the order's components.
            document: of that component's dataset.
            positions: of the order, consecutive.
        """
        return self._find(component, range(document, document + 1), positions)

    def positions_of_bytes(
        self, component: int, start: int, stop: int, positions: range
    ) -> Occurrences:
        """Return where within a range of positions any token in a range of bytes is read.

        Args:
            component: index into the order's components.
            start: first byte, from the begin of the dataset; ``dataset.tokens.shards`` says where
                each file lies.
            stop: the byte after the last one.
            positions: of the order, consecutive.
        """
        dataset = self.orders[component].dataset
        pointers, itemsize = dataset.pointers, dataset.dtype.itemsize
        found = self._find(component, _documents_of(dataset, start, stop), positions)
        # Tokens of each document that the bytes touch.
        offset = pointers[found.document]
        low = np.maximum(found.start, (start - offset) // itemsize)
        high = np.minimum(found.start + found.length, -((offset - stop) // itemsize))
        clipped = Occurrences(**{**vars(found), "start": low, "length": high - low})
        return clipped.at(high > low)

    def first_of_bytes(self, component: int, start: int, stop: int, positions: range) -> int | None:
        """Return the first position that :meth:`positions_of_bytes` gives; None if it gives none.

        In order of the file it is known without a search.
        """
        order, shift = self.orders[component], int(self._starts[component])
        if self.blend is None:
            documents = _documents_of(order.dataset, start, stop)
            own = range(positions.start + shift, positions.stop + shift)
            known = order.first_known(documents, own)
            if known is not None:
                return known - shift
        found = self.positions_of_bytes(component, start, stop, positions).position
        return int(found.min()) if len(found) else None

    def _find(self, component: int, documents: range, positions: range) -> Occurrences:
        start = int(self._starts[component])
        drawn = range(
            int(self._counts(positions.start)[component]),
            int(self._counts(positions.stop)[component]),
        )
        found = self.orders[component].find(
            documents, range(start + drawn.start, start + drawn.stop)
        )
        if self.blend is None:
            where = found.position - start
        else:
            where = self.blend.positions(component, found.position - start, positions.stop)
        return Occurrences(**{**vars(found), "position": where})

    def _counts(self, order_position: int) -> list[int]:
        if self.blend is None:
            return [order_position]
        return [int(count) for count in self.blend.counts(order_position)]

    def _read(
        self,
        positions: ArrayLike,
        dtype: np.dtype[Any],
        reader: Callable[[Order], tuple[np.dtype[Any], Callable[..., None]]],
    ) -> NDArray[Any]:
        refs = self.locate(positions)
        out = np.empty((len(refs.sample), self.seq_length + 1), dtype=dtype)
        for number, rows in groups(refs.dataset):
            stored, read = reader(self.orders[number])
            if stored == dtype:
                read(refs.block[rows], refs.sample[rows], out, rows)
            else:  # a blend of files in different types
                part = np.empty((len(rows), out.shape[1]), dtype=stored)
                read(refs.block[rows], refs.sample[rows], part, np.arange(len(rows)))
                out[rows] = part
        return out

    def _spans(self, refs: SampleRefs) -> StreamSpans:
        parts = []
        for number, rows in groups(refs.dataset):
            part = self.orders[number].spans(refs.block[rows], refs.sample[rows])
            component = np.full(len(part), number, dtype=np.int16)
            own = StreamSpans(rows[part.row], part.document, part.start, part.length, component)
            if len(rows) == len(refs.dataset):
                return own
            parts.append(own)
        return _in_row_order(parts)

    def _padding(self, documents: Sequence[tuple[DocumentPart, ...]]) -> list[int]:
        """Return how many tokens of each sample are no document's."""
        if not any(order.is_padded for order in self.orders):
            return [0] * len(documents)
        width = self.seq_length + 1
        return [width - sum(part.stop - part.start for part in parts) for parts in documents]


def _documents_of(dataset: IndexedDataset, start: int, stop: int) -> range:
    """Return the documents that have bytes in a range, and perhaps empty ones beside them."""
    # Searched in the mapped file: numpy.searchsorted would copy all of it.
    first = max(0, bisect_right(dataset.pointers, start) - 1)
    return range(first, bisect_left(dataset.pointers, stop))


def _label_dtype(order: Order) -> np.dtype[Any]:
    if order.labels is None:
        raise ValueError(f"{order.dataset.prefix}: its samples have no labels")
    return np.promote_types(order.labels.dtype, np.int8)


def _in_row_order(parts: list[StreamSpans]) -> StreamSpans:
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return StreamSpans(empty, empty, empty, empty, empty.astype(np.int16))
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])
    }
    order = np.argsort(columns["row"], kind="stable")
    return StreamSpans(**{name: column[order] for name, column in columns.items()})
