"""NeoX's index maps for packed samples, computed bit for bit.

Documents are repeated for a number of epochs, shuffled together, and read as one long row of
tokens. Sample ``s`` is ``seq_length + 1`` tokens of it from token ``s * seq_length`` on, so
neighbours share one token. Three arrays say it all:

- ``doc_idx``: the shuffled documents,
- ``sample_idx``: row ``s`` is where sample ``s`` begins, as (index into ``doc_idx``, token offset);
  its last token is the one where sample ``s + 1`` begins,
- ``shuffle_idx``: the order in which samples are consumed.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.stream import compiled
from megatron.stream.legacy_random import LegacyGenerator

__all__ = [
    "IndexMaps",
    "PackedShape",
    "build_packed_maps",
    "count_tokens",
    "epochs_needed",
    "sample_rows",
    "shuffled_documents",
    "shuffled_samples",
]

_ROWS_PER_CHUNK = 1 << 19
_DOCUMENTS_PER_PIECE = 1 << 16


@dataclass(frozen=True)
class PackedShape:
    """The numbers that fix the size of packed index maps."""

    documents: range  # of the dataset, consecutive
    tokens_per_epoch: int
    num_epochs: int
    seq_length: int

    @property
    def num_samples(self) -> int:
        """Samples that the epochs give; a rest too short for one is left over."""
        return max(0, self.num_epochs * self.tokens_per_epoch - 1) // self.seq_length

    @property
    def sample_idx_dtype(self) -> np.dtype[Any]:
        """NeoX's rule, in its own arithmetic: a true division of floats."""
        samples = (self.num_epochs * self.tokens_per_epoch - 1) / self.seq_length
        return np.dtype(np.int32 if 2 * (samples + 1) < 2147483647 else np.int64)

    @property
    def shuffle_idx_dtype(self) -> np.dtype[Any]:
        """NeoX's rule."""
        return np.dtype(np.int64 if self.num_samples >= 4294967294 else np.uint32)

    @property
    def size_bytes(self) -> int:
        """Bytes of the three arrays."""
        per_sample = 2 * self.sample_idx_dtype.itemsize + self.shuffle_idx_dtype.itemsize
        return 4 * self.num_epochs * len(self.documents) + self.num_samples * per_sample


@dataclass(frozen=True)
class IndexMaps:
    """The three arrays; in memory or mapped from files."""

    doc_idx: NDArray[Any]  # (num_epochs * num_documents,), int32; int64 if not packed
    sample_idx: NDArray[Any]  # (num_samples + 1, 2), int32 or int64
    shuffle_idx: NDArray[Any]  # (num_samples,), uint32 or int64

    @property
    def num_samples(self) -> int:
        """Samples, the last shuffled one included."""
        return len(self.shuffle_idx)


def count_tokens(sizes: NDArray[np.int32], documents: range) -> int:
    """Return the tokens of one epoch of ``documents``.

    Raises:
        DatasetError: a size is negative.
    """
    chosen = sizes[documents.start : documents.stop]
    if len(chosen) and int(chosen.min()) < 0:
        document = documents.start + int(chosen.argmin())
        raise DatasetError(f"document {document} has the negative size {chosen.min()}")
    return int(chosen.sum(dtype=np.int64))


def epochs_needed(tokens_per_epoch: int, seq_length: int, num_samples: int) -> int:
    """Return the fewest epochs, at least one, that give ``num_samples`` samples.

    Raises:
        DatasetError: there are no tokens at all.
    """
    if tokens_per_epoch < 1:
        raise DatasetError("the documents hold no tokens")
    return max(1, -(-(num_samples * seq_length + 1) // tokens_per_epoch))


def build_packed_maps(sizes: NDArray[np.int32], shape: PackedShape, seed: int) -> IndexMaps:
    """Compute the three arrays in memory."""
    generator = LegacyGenerator(seed)
    doc_idx = shuffled_documents(shape, generator)
    with ThreadPoolExecutor(1) as thread:  # the walk doesn't touch the generator
        shuffle_idx = thread.submit(shuffled_samples, shape, generator)
        sample_idx = np.empty((shape.num_samples + 1, 2), dtype=shape.sample_idx_dtype)
        filled = 0
        for rows in sample_rows(sizes, doc_idx, shape):
            sample_idx[filled : filled + len(rows)] = rows
            filled += len(rows)
    return IndexMaps(doc_idx, sample_idx, shuffle_idx.result())


def shuffled_documents(shape: PackedShape, generator: LegacyGenerator) -> NDArray[np.int32]:
    """Return ``doc_idx``: all epochs shuffled as one array."""
    num_documents = len(shape.documents)
    doc_idx = np.empty(shape.num_epochs * num_documents, dtype=np.int32)
    for epoch in doc_idx.reshape(shape.num_epochs, num_documents):
        for start in range(0, num_documents, _DOCUMENTS_PER_PIECE):  # no second large array
            piece = shape.documents[start : start + _DOCUMENTS_PER_PIECE]
            epoch[start : start + len(piece)] = np.arange(piece.start, piece.stop, dtype=np.int32)
    generator.shuffle(doc_idx)
    return doc_idx


def sample_rows(
    sizes: NDArray[np.int32], doc_idx: NDArray[np.int32], shape: PackedShape
) -> Iterator[NDArray[Any]]:
    """Yield ``sample_idx`` in pieces of consecutive rows, so that it need not be held whole.

    A piece is overwritten by the next one.

    Raises:
        ValueError: ``doc_idx`` names documents that are not there, or too few tokens.
    """
    # The first row is (0, 0) even if document doc_idx[0] is empty.
    chunk = np.zeros((_ROWS_PER_CHUNK, 2), dtype=shape.sample_idx_dtype)
    yield chunk[:1]
    document, ahead = 0, shape.seq_length
    for first in range(0, shape.num_samples, _ROWS_PER_CHUNK):
        rows = chunk[: min(_ROWS_PER_CHUNK, shape.num_samples - first)]
        document, ahead = compiled.walk(sizes, doc_idx, rows, shape.seq_length, document, ahead)
        yield rows


def shuffled_samples(shape: PackedShape, generator: LegacyGenerator) -> NDArray[Any]:
    """Return ``shuffle_idx``; ``generator`` must have shuffled the documents before."""
    shuffle_idx = np.arange(shape.num_samples, dtype=shape.shuffle_idx_dtype)
    generator.shuffle(shuffle_idx)
    return shuffle_idx
