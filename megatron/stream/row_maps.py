"""Index maps of documents that are not cut: one a row, or as many as fit.

``unpacked`` gives every document a row of its own; ``pack_until_overflow`` fills a row until the
next document would not fit. The three arrays have the same meaning as those of packed samples
(index_maps): row ``r`` of ``sample_idx`` is where row ``r`` begins, and it ends with the *first
token of the next row's first document*, a quirk of NeoX's that is kept. Whoever reads a row cuts it
to seq_length + 1 tokens, or pads it.

A head is NeoX's, bit for bit: as many rows as samples were asked for, samples shuffled before
documents, documents repeated until there are enough. A tail block is one pass over the documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.stream.index_maps import IndexMaps
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.legacy_random import LegacyGenerator

__all__ = ["RowRule", "build_block", "build_head", "keeps", "readable_head", "rows_per_block"]

_MASKED = -100  # label of a token that is not learned
_TOKENS_PER_PIECE = 1 << 22
_DOCUMENTS_PER_PIECE = 1 << 20


@dataclass(frozen=True)
class RowRule:
    """Which documents become rows, and how."""

    packing: Literal["unpacked", "pack_until_overflow"]
    documents: range  # of the dataset, consecutive
    seq_length: int
    allow_chopped: bool  # False: documents longer than a row are left out


def keeps(
    rule: RowRule, dataset: IndexedDataset, labels: IndexedDataset | None
) -> NDArray[np.bool_]:
    """Return for each of the rule's documents whether it is used.

    Left out are documents too long (unless chopped), those whose labels are all masked as far as a
    row shows them, and without labels empty ones.

    Raises:
        DatasetError: none is used.
    """
    sizes = dataset.sizes[rule.documents.start : rule.documents.stop]
    kept = np.ones(len(rule.documents), dtype=np.bool_)
    if not rule.allow_chopped:
        kept &= sizes <= rule.seq_length + 1
    if labels is not None:
        shown = rule.seq_length + (rule.packing == "pack_until_overflow")
        kept &= _has_labels(labels, rule.documents, shown)
    elif rule.packing == "unpacked":
        kept &= sizes > 0
    if not kept.any():
        raise DatasetError(
            f"{dataset.prefix}: none of {len(kept)} documents can be used: they are empty, longer "
            f"than seq_length + 1 = {rule.seq_length + 1} (allow_chopped: {rule.allow_chopped}), "
            "or all their labels are masked"
        )
    return kept


def build_head(
    rule: RowRule, sizes: NDArray[np.int32], kept: NDArray[np.bool_], num_rows: int, seed: int
) -> IndexMaps:
    """Return NeoX's arrays for ``num_rows`` samples, int64 as NeoX saves them."""
    generator = LegacyGenerator(seed)
    shuffle_idx = np.arange(num_rows, dtype=np.int64)
    generator.shuffle(shuffle_idx)
    if rule.packing == "unpacked":
        used = rule.documents.start + np.flatnonzero(kept)
        doc_idx = np.resize(used, num_rows + 1)
        return IndexMaps(doc_idx, _one_each(num_rows), shuffle_idx)
    bins = _Bins(rule.seq_length + 1)
    passed = np.arange(len(kept), dtype=np.int64)
    while len(bins.starts) < num_rows:
        generator.shuffle(passed)
        bins.fill(rule.documents.start + passed[kept[passed]], sizes, num_rows)
    return IndexMaps(bins.doc_idx(), bins.sample_idx(), shuffle_idx)


def readable_head(rule: RowRule, head: IndexMaps) -> IndexMaps:
    """Return a head as NeoX reads it, where its arrays leave that open.

    With ``pack_until_overflow`` the last row has no next document to end with; NeoX fails there,
    and takes the first sample of all instead. So does this.
    """
    if rule.packing == "unpacked" or not head.num_samples:
        return head
    last, first = head.num_samples - 1, head.shuffle_idx[0]
    shuffle_idx = np.where(head.shuffle_idx == last, first, head.shuffle_idx)
    # Where the last row is the first sample itself NeoX doesn't end at all.
    return IndexMaps(np.append(head.doc_idx, head.doc_idx[:1]), head.sample_idx, shuffle_idx)


def build_block(
    rule: RowRule, sizes: NDArray[np.int32], kept: NDArray[np.bool_], seed: int
) -> IndexMaps:
    """Return the arrays of one pass; after the last document comes the first one again."""
    generator = LegacyGenerator(seed)
    if rule.packing == "unpacked":
        used = rule.documents.start + np.flatnonzero(kept)
        sample_idx = _one_each(len(used))
    else:
        passed = np.arange(len(kept), dtype=np.int64)
        generator.shuffle(passed)
        bins = _Bins(rule.seq_length + 1)
        bins.fill(rule.documents.start + passed[kept[passed]], sizes, None)
        used, sample_idx = bins.doc_idx(), bins.sample_idx()
    shuffle_idx = np.arange(len(sample_idx) - 1, dtype=np.int64)
    generator.shuffle(shuffle_idx)
    return IndexMaps(np.append(used, used[:1]), sample_idx, shuffle_idx)


def rows_per_block(rule: RowRule, kept: NDArray[np.bool_]) -> int | None:
    """Return the rows of every tail block; None where they depend on how documents are shuffled."""
    return int(np.count_nonzero(kept)) if rule.packing == "unpacked" else None


class _Bins:
    """Documents packed greedily: one that would not fit opens a new row."""

    def __init__(self, row_tokens: int) -> None:
        self.starts: list[int] = []  # per row, index into the documents
        self._row_tokens = row_tokens
        self._filled = 0  # tokens in the last row
        self._pieces: list[NDArray[np.int64]] = []
        self._num_documents = 0

    def fill(
        self, documents: NDArray[np.int64], sizes: NDArray[np.int32], num_rows: int | None
    ) -> None:
        """Add documents, up to the one that opens row number ``num_rows``."""
        for piece in _pieces(documents, _DOCUMENTS_PER_PIECE):
            first = self._num_documents
            taken = len(piece)
            for index, size in enumerate(sizes[piece].tolist()):
                if self.starts and self._filled + size <= self._row_tokens:
                    self._filled += size
                    continue
                self._filled = size
                self.starts.append(first + index)
                if len(self.starts) == num_rows:
                    taken = index + 1
                    break
            self._pieces.append(piece[:taken])
            self._num_documents += taken
            if len(self.starts) == num_rows:
                return

    def doc_idx(self) -> NDArray[np.int64]:
        return np.concatenate(self._pieces) if self._pieces else np.zeros(0, dtype=np.int64)

    def sample_idx(self) -> NDArray[np.int64]:
        rows = np.zeros((len(self.starts) + 1, 2), dtype=np.int64)
        rows[:-1, 0] = self.starts
        rows[-1, 0] = self._num_documents
        return rows


def _one_each(num_rows: int) -> NDArray[np.int64]:
    rows = np.zeros((num_rows + 1, 2), dtype=np.int64)
    rows[:, 0] = np.arange(num_rows + 1)
    return rows


def _pieces(array: NDArray[np.int64], length: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(array), length):
        yield array[start : start + length]


def _has_labels(labels: IndexedDataset, documents: range, shown: int) -> NDArray[np.bool_]:
    """Whether any of a document's first ``shown`` labels is not masked."""
    has = np.zeros(len(documents), dtype=np.bool_)
    itemsize = labels.dtype.itemsize
    sizes = labels.sizes[documents.start : documents.stop].astype(np.int64)
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = int(ends[start] - sizes[start])
        stop = max(start + 1, int(np.searchsorted(ends, before + _TOKENS_PER_PIECE, side="right")))
        first = int(labels.pointers[documents.start + start])
        content = labels.tokens.read(first, first + (int(ends[stop - 1]) - before) * itemsize)
        counts = np.zeros(len(content) // itemsize + 1, dtype=np.int64)
        np.cumsum(np.frombuffer(content, labels.dtype) != _MASKED, out=counts[1:])
        begin = ends[start:stop] - sizes[start:stop] - before
        seen = np.minimum(sizes[start:stop], shown)
        has[start:stop] = counts[begin + seen] > counts[begin]
        start = stop
    return has
