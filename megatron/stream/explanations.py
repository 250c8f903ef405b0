"""What samples are made of, down to bytes of files: values to show, not to compute with."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.stream.orders import TokenSpans
from megatron.stream.token_bytes import TokenBytes

__all__ = ["ByteRange", "DocumentPart", "SampleParts", "document_parts"]


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


def document_parts(
    tokens: TokenBytes, spans: TokenSpans, starts: NDArray[np.int64], itemsize: int
) -> list[DocumentPart]:
    """Return spans of one dataset with the bytes that hold them.

    Args:
        tokens: of the dataset.
        spans: which tokens.
        starts: bytes from the dataset's begin to each span.
        itemsize: bytes of a token.
    """
    ranges = _byte_ranges(tokens, starts, starts + spans.length * itemsize)
    return list(
        map(
            DocumentPart,
            spans.document.tolist(),
            spans.start.tolist(),
            (spans.start + spans.length).tolist(),
            ranges,
        )
    )


def _byte_ranges(
    tokens: TokenBytes, starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> Sequence[tuple[ByteRange, ...]]:
    if len(tokens.shards) == 1:
        path = tokens.shards[0].path
        return [
            (ByteRange(path, start, stop),)
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
        ]
    first, last = tokens.shards_of(starts, stops)
    result = []
    for start, stop, index, end in zip(
        starts.tolist(), stops.tolist(), first.tolist(), last.tolist(), strict=True
    ):
        shards = tokens.shards[index : end + 1]
        result.append(
            tuple(
                ByteRange(
                    shard.path,
                    max(start, shard.start) - shard.start,
                    min(stop, shard.stop) - shard.start,
                )
                for shard in shards
                if shard.start < shard.stop
            )
        )
    return result
