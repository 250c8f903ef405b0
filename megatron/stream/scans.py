"""Looking things up in index maps backwards: by reading them through, piece by piece.

Maps are arrays of hundreds of megabytes, mapped from files. A pass over one takes tenths of a
second, and needs no index that someone would have to build and keep.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["indices_between", "indices_of", "ranks", "rows_containing"]

_PIECE = 1 << 19  # items: a piece and what is computed of it stay in a core's cache
_FEW_RUNS = 4  # are compared one by one; more are looked up in a table


def indices_between(values: NDArray[Any], first: int, stop: int) -> NDArray[np.int64]:
    """Return where ``values`` are at least ``first`` and below ``stop``, ascending."""
    found = []
    for start in range(0, len(values), _PIECE):
        chosen = _between(values[start : start + _PIECE], first, stop)
        if chosen.any():
            found.append(start + np.flatnonzero(chosen))
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def indices_of(
    values: NDArray[Any], wanted: NDArray[np.int64], indices: range, limit: int
) -> NDArray[np.int64]:
    """Return which of some consecutive ``indices`` hold one of ``wanted``.

    Args:
        values: numbers from 0 to below ``limit``.
        wanted: ascending, without duplicates.
        indices: where to look.
        limit: see ``values``.
    """
    if not len(wanted):  # a document behind the last whole sample
        return np.zeros(0, dtype=np.int64)
    borders = np.flatnonzero(np.diff(wanted) > 1)
    runs = list(
        zip(
            wanted[np.concatenate([[0], borders + 1])].tolist(),
            (wanted[np.concatenate([borders, [len(wanted) - 1]])] + 1).tolist(),
            strict=True,
        )
    )
    table = None
    if len(runs) > _FEW_RUNS:
        table = np.zeros(limit, dtype=np.bool_)
        table[wanted] = True
    found = []
    for start in range(indices.start, indices.stop, _PIECE):
        piece = values[start : min(start + _PIECE, indices.stop)]
        if table is not None:
            chosen = table[piece]
        else:
            chosen = _between(piece, *runs[0])
            for run in runs[1:]:
                chosen |= _between(piece, *run)
        if chosen.any():
            found.append(start + np.flatnonzero(chosen))
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def rows_containing(sample_idx: NDArray[Any], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows of ``sample_idx`` that touch documents at ``places``, ascending.

    Args:
        sample_idx: where samples begin, shape (num_samples + 1, 2).
        places: indices into ``doc_idx``, ascending.
    """
    # A row goes from where it begins to where the next one begins, both included.
    first = np.maximum(_first_at_least(sample_idx, places) - 1, 0)
    last = np.minimum(_first_at_least(sample_idx, places + 1) - 1, len(sample_idx) - 2)
    # Neighbouring places may share a row.
    first[1:] = np.maximum(first[1:], last[:-1] + 1)
    counts = np.maximum(last - first + 1, 0)
    before = np.cumsum(counts) - counts
    rows: NDArray[np.int64] = np.repeat(first - before, counts) + np.arange(counts.sum())
    return rows


def ranks(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return how many equal values stand before each one.

    Example:
        >>> ranks(np.array([7, 3, 7, 7])).tolist()
        [0, 0, 1, 2]
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(values)]
    places = np.arange(len(values))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return result


def _between(values: NDArray[Any], first: int, stop: int) -> NDArray[np.bool_]:
    if stop == first + 1:
        chosen: NDArray[np.bool_] = values == first
    else:
        chosen = (values >= first) & (values < stop)
    return chosen


def _first_at_least(sample_idx: NDArray[Any], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first row that begins at or after each wanted document; the rows ascend.

    ``numpy.searchsorted`` would copy the column first.
    """
    low = np.zeros(len(wanted), dtype=np.int64)
    high = np.full(len(wanted), len(sample_idx), dtype=np.int64)
    while (is_open := low < high).any():
        middle = np.where(is_open, (low + high) // 2, 0)
        is_before = sample_idx[middle, 0] < wanted
        low = np.where(is_open & is_before, middle + 1, low)
        high = np.where(is_open & ~is_before, middle, high)
    return low
