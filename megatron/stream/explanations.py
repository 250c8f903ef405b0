"""What samples are made of, down to bytes of files: values to show, not to compute with."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron.stream.orders import Order
from megatron.stream.token_bytes import TokenBytes

__all__ = ["ByteRange", "DocumentPart", "SampleParts", "named_tuples", "sample_documents"]

_Named = TypeVar("_Named", bound=tuple[Any, ...])


class ByteRange(NamedTuple):
    """Consecutive bytes of one file."""

    path: Path
    start: int
    stop: int


class DocumentPart(NamedTuple):
    """The tokens of one document that a sample has."""

    document: int
    start: int  # tokens from the document's begin
    stop: int
    bytes: tuple[ByteRange, ...]  # several if a cut between shards falls inside


class SampleParts(NamedTuple):
    """One sample: which it is, and all it is made of in reading order."""

    position: int  # of the order
    component: int  # index into the order's components
    key: str  # of that component
    prefix: str  # of the dataset
    block: int  # 0: head; 1 and on: tail blocks
    epochs: range  # passes over the documents that the block consists of, the first being 1
    sample: int  # row of the block
    documents: tuple[DocumentPart, ...]
    padding: int  # tokens added at the end


def sample_documents(
    order: Order, block: NDArray[np.int64], sample: NDArray[np.int64]
) -> list[tuple[DocumentPart, ...]]:
    """Return what samples found by ``order.locate`` are made of, in reading order."""
    spans = order.spans(block, sample)
    dataset = order.dataset
    itemsize = dataset.dtype.itemsize
    starts = dataset.pointers[spans.document] + spans.start * itemsize
    parts = named_tuples(
        DocumentPart,
        spans.document.tolist(),
        spans.start.tolist(),
        (spans.start + spans.length).tolist(),
        _byte_ranges(dataset.tokens, starts, starts + spans.length * itemsize),
    )
    if len(sample) == 1:
        return [tuple(parts)]
    borders = np.searchsorted(spans.row, np.arange(len(sample) + 1)).tolist()
    return [tuple(parts[first:stop]) for first, stop in itertools.pairwise(borders)]


def named_tuples(kind: type[_Named], *columns: Iterable[Any]) -> list[_Named]:
    """Return one tuple per row of the columns; several times as fast as calls of ``kind``."""
    return list(map(tuple.__new__, itertools.repeat(kind), zip(*columns, strict=True)))


def _byte_ranges(
    tokens: TokenBytes, starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> list[tuple[ByteRange, ...]]:
    paths = [shard.path for shard in tokens.shards]
    if len(paths) == 1:
        ranges = named_tuples(
            ByteRange, itertools.repeat(paths[0], len(starts)), starts.tolist(), stops.tolist()
        )
        return list(zip(ranges, strict=True))
    first, last = tokens.shards_of(starts, stops)
    begin = tokens.starts[first]
    ranges = named_tuples(
        ByteRange,
        [paths[index] for index in first.tolist()],
        (starts - begin).tolist(),
        (stops - begin).tolist(),
    )
    result: list[tuple[ByteRange, ...]] = list(zip(ranges, strict=True))
    for index in np.flatnonzero(first != last).tolist():
        pieces = tokens.parts(int(starts[index]), int(stops[index]))
        result[index] = tuple(ByteRange(paths[shard], *piece) for shard, *piece in pieces)
    return result
