"""Whether a preshuffled copy holds, row after row, the samples that a run reads."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.ledger.queries.required import StepPiece
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.order_description import OrderDescription
from megatron.stream.sample_stream import Stream

__all__ = ["RowDifference", "compare_rows"]

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class RowDifference:
    """A sample that isn't the row of its position."""

    step: int
    position: int  # of the stream
    row: int  # document of the preshuffled copy
    token: int  # the first that differs, from 0
    expected: int  # what the run reads
    found: int

    def __str__(self) -> str:
        return (
            f"step {self.step}, position {self.position}: row {self.row} has {self.found} at token "
            f"{self.token}, the run reads {self.expected}"
        )


def compare_rows(
    pieces: Iterable[StepPiece],
    open_order: Callable[[OrderDescription], Stream],
    rows: IndexedDataset,
    *,
    first_row: int = 0,
    on_samples: Callable[[int], None] = lambda done: None,
) -> Iterator[RowDifference]:
    """Yield the samples that differ from the rows of their positions.

    Args:
        pieces: the steps to compare.
        open_order: opens an order.
        rows: the preshuffled copy, one sample per document.
        first_row: the row of position 0.
        on_samples: told how many samples are done.

    Raises:
        DatasetError: a row isn't there or has another length, or data is missing.
    """
    done = 0
    for piece in pieces:
        stream = open_order(piece.order)
        shift = piece.first_position - piece.positions.start
        for first in range(piece.positions.start, piece.positions.stop, _ROWS_AT_ONCE):
            places = np.arange(first, min(first + _ROWS_AT_ONCE, piece.positions.stop))
            expected = stream.read(places)
            row = first + shift + first_row
            found = _read_rows(rows, range(row, row + len(places)), stream.seq_length + 1)
            is_other = expected != found
            for index in np.flatnonzero(is_other.any(axis=1)).tolist():
                token = int(is_other[index].argmax())
                yield RowDifference(
                    step=piece.step_of(first + index),
                    position=first + shift + index,
                    row=row + index,
                    token=token,
                    expected=int(expected[index, token]),
                    found=int(found[index, token]),
                )
            done += len(places)
            on_samples(done)


def _read_rows(dataset: IndexedDataset, rows: range, width: int) -> NDArray[Any]:
    """Return consecutive documents of ``width`` tokens as an array."""
    if not 0 <= rows.start < rows.stop <= len(dataset):
        raise DatasetError(
            f"{dataset.prefix} has rows 0..{len(dataset) - 1}, not {rows.start}..{rows.stop - 1}"
        )
    is_other = dataset.sizes[rows.start : rows.stop] != width
    if is_other.any():
        row = rows.start + int(is_other.argmax())
        raise DatasetError(
            f"{dataset.prefix}: row {row} has {dataset.sizes[row]} tokens; samples have {width}"
        )
    size_bytes = len(rows) * width * dataset.dtype.itemsize
    start = int(dataset.pointers[rows.start])
    tokens = dataset.tokens.read(start, start + size_bytes)
    return np.frombuffer(tokens, dtype=dataset.dtype).reshape(len(rows), width)
