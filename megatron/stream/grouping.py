"""Splitting an array of small numbers (datasets, blocks, chunks) into equal ones."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["groups"]


def groups(numbers: NDArray[np.integer[Any]]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each number that occurs, ascending, with the ascending indices where it stands.

    Example:
        >>> [(number, where.tolist()) for number, where in groups(np.array([7, 3, 7]))]
        [(3, [1]), (7, [0, 2])]
    """
    if not len(numbers):
        return
    # Nearly always so for the positions of a micro batch.
    if len(numbers) == 1 or (numbers == numbers[0]).all():
        yield int(numbers[0]), np.arange(len(numbers))
        return
    by_number = np.argsort(numbers, kind="stable")
    borders = np.flatnonzero(np.diff(numbers[by_number])) + 1
    for where in np.split(by_number, borders):
        yield int(numbers[where[0]]), where
