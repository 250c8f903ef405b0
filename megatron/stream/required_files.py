"""Which files, and which bytes of them, the samples at a range of positions are read from.

Only index files and index maps are looked at, so the token files need not be there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.sample_stream import Stream
from megatron.stream.shard_layout import Shard
from megatron.stream.token_bytes import TokenBytes

__all__ = ["FileNeed", "FileUse", "first_missing", "required_files"]

_CHUNK = 1 << 15  # positions
_WALKED = 1 << 19  # positions looked through one after the other for the first need of a file

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class FileUse:
    """What samples read of one file."""

    shard: Shard
    num_samples: int
    num_bytes: int  # read: what several samples have in common counts as often
    first_position: int  # of the order
    last_position: int
    start: int  # first byte of the file that is read
    stop: int  # the byte after the last one
    ranges: tuple[tuple[int, int], ...] | None = None  # distinct, ascending; None: not asked for


@dataclass(frozen=True)
class FileNeed:
    """A file that isn't there, and where it is read first."""

    path: Path
    position: int  # of the order


def required_files(
    stream: Stream,
    positions: range,
    *,
    tokens_of: Callable[[IndexedDataset], TokenBytes] = lambda dataset: dataset.tokens,
    with_ranges: bool = False,
    on_positions: Callable[[int], None] = lambda done: None,
) -> list[FileUse]:
    """Return the files that samples are read from, labels too, by dataset and in order.

    Args:
        stream: of an order.
        positions: of the order, consecutive.
        tokens_of: the files of a dataset.
        with_ranges: collect the ranges of bytes too, 16 bytes of memory for each.
        on_positions: told how many positions are done.
    """
    tables = {
        dataset.prefix: _Table(tokens_of(dataset), with_ranges=with_ranges)
        for component in range(len(stream.orders))
        for dataset in _datasets(stream, component)
    }
    for first in range(positions.start, positions.stop, _CHUNK):
        chunk = np.arange(first, min(first + _CHUNK, positions.stop), dtype=np.int64)
        for read in _reads(stream, chunk):
            table = tables[read.dataset.prefix]
            table.add(_pieces(table.tokens, read), chunk)
        on_positions(int(chunk[-1]) + 1 - positions.start)
    return [use for table in tables.values() for use in table.uses()]


def first_missing(stream: Stream, positions: range) -> list[FileNeed]:
    """Return the files that samples need and that aren't there, by the position that needs them.

    Files of documents that the order doesn't read cost nothing. The others are met within a few
    steps of shuffled data; what isn't met soon is looked for in the index maps.

    Args:
        stream: of an order.
        positions: of the order, consecutive.
    """
    absent = {
        part.shard.path: part
        for component in range(len(stream.orders))
        for part in _absent_parts(stream, component)
    }
    found: dict[Path, int] = {}
    start, length = positions.start, 1024
    walked_to = min(positions.stop, start + _WALKED)
    while start < walked_to and len(found) < len(absent):
        chunk = np.arange(start, min(start + length, walked_to), dtype=np.int64)
        for read in _reads(stream, chunk):
            pieces = _pieces(read.dataset.tokens, read)
            # Rows ascend, so the first piece of a shard is its first need.
            for index, at in zip(*np.unique(pieces.shard, return_index=True), strict=True):
                path = read.dataset.tokens.shards[index].path
                if path in absent:
                    position = int(chunk[pieces.row[at]])
                    found[path] = min(position, found.get(path, position))
        start, length = int(chunk[-1]) + 1, min(2 * length, _CHUNK)
    if start < positions.stop:
        for component in range(len(stream.orders)):
            for part in _absent_parts(stream, component):
                path = part.shard.path
                if path in found and found[path] < start:
                    continue
                where = stream.first_of_bytes(
                    component, part.start, part.stop, range(start, positions.stop)
                )
                if where is not None:
                    found[path] = min(where, found.get(path, where))
    needs = (FileNeed(path, position) for path, position in found.items())
    return sorted(needs, key=lambda need: (need.position, need.path))


class _Read(NamedTuple):
    """Bytes of one dataset that samples are read from, one entry per document and sample."""

    dataset: IndexedDataset
    row: Integers  # which of the positions asked for, ascending
    start: Integers
    stop: Integers


class _Pieces(NamedTuple):
    """The same, cut at the borders of shards."""

    row: Integers
    shard: Integers
    start: Integers  # bytes of the dataset
    stop: Integers


class _AbsentPart(NamedTuple):
    """A missing file with documents of a component."""

    shard: Shard
    start: int  # bytes of the tokens whose samples need it
    stop: int


def _datasets(stream: Stream, component: int) -> list[IndexedDataset]:
    order = stream.orders[component]
    return [order.dataset] if order.labels is None else [order.dataset, order.labels]


def _reads(stream: Stream, positions: Integers) -> Iterator[_Read]:
    spans = stream.spans(positions)
    for component in np.unique(spans.component).tolist():
        which = slice(None)
        if len(stream.orders) > 1:
            which = np.flatnonzero(spans.component == component)  # type: ignore[assignment]
        row, document = spans.row[which], spans.document[which]
        first, length = spans.start[which], spans.length[which]
        for dataset in _datasets(stream, component):
            itemsize = dataset.dtype.itemsize
            start = dataset.pointers[document] + first * itemsize
            yield _Read(dataset, row, start, start + length * itemsize)


def _pieces(tokens: TokenBytes, read: _Read) -> _Pieces:
    first, last = tokens.shards_of(read.start, read.stop)
    if np.array_equal(first, last):
        return _Pieces(read.row, first, read.start, read.stop)
    count = last - first + 1
    span = np.repeat(np.arange(len(first)), count)
    shard = first[span] + np.arange(len(span)) - np.repeat(np.cumsum(count) - count, count)
    ends = np.append(tokens.starts[1:], tokens.size)
    start = np.maximum(read.start[span], tokens.starts[shard])
    stop = np.minimum(read.stop[span], ends[shard])
    filled = np.flatnonzero(stop > start)  # an empty file lies between two others
    return _Pieces(read.row[span][filled], shard[filled], start[filled], stop[filled])


def _absent_parts(stream: Stream, component: int) -> Iterator[_AbsentPart]:
    """Yield the missing files that hold bytes of a component's documents."""
    documents = stream.description.components[component].documents
    if not documents:
        return
    token_size = stream.orders[component].dataset.dtype.itemsize
    for dataset in _datasets(stream, component):
        itemsize, last = dataset.dtype.itemsize, documents.stop - 1
        begin = int(dataset.pointers[documents.start])
        end = int(dataset.pointers[last]) + itemsize * int(dataset.sizes[last])
        for shard in dataset.tokens.missing:
            start, stop = max(begin, shard.start), min(end, shard.stop)
            if start < stop:  # labels may be of another type than the tokens they lie beside
                yield _AbsentPart(
                    shard, start // itemsize * token_size, -(-stop // itemsize) * token_size
                )


class _Table:
    """Adds up what is read of each file of a dataset."""

    def __init__(self, tokens: TokenBytes, *, with_ranges: bool) -> None:
        self.tokens = tokens
        num_shards = len(tokens.shards)
        self._samples = np.zeros(num_shards, dtype=np.int64)
        self._bytes = np.zeros(num_shards, dtype=np.int64)
        self._first = np.full(num_shards, np.iinfo(np.int64).max)
        self._last = np.full(num_shards, -1, dtype=np.int64)
        self._start = np.full(num_shards, np.iinfo(np.int64).max)
        self._stop = np.zeros(num_shards, dtype=np.int64)
        self._ranges: list[tuple[Integers, Integers]] | None = [] if with_ranges else None

    def add(self, pieces: _Pieces, positions: Integers) -> None:
        """Add what the samples at ``positions`` read."""
        num_shards, shard = len(self._samples), pieces.shard
        np.add.at(self._bytes, shard, pieces.stop - pieces.start)
        np.minimum.at(self._start, shard, pieces.start)
        np.maximum.at(self._stop, shard, pieces.stop)
        # A sample counts once in a file, of however many documents it is.
        touched, row = np.divmod(np.unique(shard * len(positions) + pieces.row), len(positions))
        self._samples += np.bincount(touched, minlength=num_shards)
        np.minimum.at(self._first, touched, positions[row])
        np.maximum.at(self._last, touched, positions[row])
        if self._ranges is not None:
            self._ranges.append(_merged(pieces.start, pieces.stop))

    def uses(self) -> Iterator[FileUse]:
        """Yield the files of which anything is read."""
        merged = None
        if self._ranges is not None:
            starts, stops = zip(*self._ranges, strict=True) if self._ranges else ((), ())
            none = np.zeros(0, dtype=np.int64)
            merged = _merged(np.concatenate([none, *starts]), np.concatenate([none, *stops]))
        for index in np.flatnonzero(self._samples).tolist():
            shard = self.tokens.shards[index]
            yield FileUse(
                shard=shard,
                num_samples=int(self._samples[index]),
                num_bytes=int(self._bytes[index]),
                first_position=int(self._first[index]),
                last_position=int(self._last[index]),
                start=int(self._start[index]) - shard.start,
                stop=int(self._stop[index]) - shard.start,
                ranges=None if merged is None else _clipped(*merged, shard),
            )


def _merged(starts: Integers, stops: Integers) -> tuple[Integers, Integers]:
    """Return the same bytes in ascending ranges that neither touch nor overlap."""
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], np.maximum.accumulate(stops[order])
    begins = np.ones(len(starts), dtype=bool)
    begins[1:] = starts[1:] > stops[:-1]
    ends = np.append(begins[1:], True)[: len(starts)]
    return starts[begins], stops[ends]


def _clipped(starts: Integers, stops: Integers, shard: Shard) -> tuple[tuple[int, int], ...]:
    """Return the ranges within a file, in its own bytes."""
    first = np.searchsorted(stops, shard.start, side="right")
    last = np.searchsorted(starts, shard.stop, side="left")
    begin = np.maximum(starts[first:last], shard.start) - shard.start
    end = np.minimum(stops[first:last], shard.stop) - shard.start
    return tuple(zip(begin.tolist(), end.tolist(), strict=True))
