"""The endless sequence of samples that a run consumes: positions in, tokens out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron.stream.blending import Blend
from megatron.stream.grouping import groups
from megatron.stream.orders import PackedOrder

__all__ = ["SampleRefs", "Stream"]


@dataclass(frozen=True)
class SampleRefs:
    """Which samples stand at the positions asked for, one entry each."""

    dataset: NDArray[np.int16]  # index into Stream.orders
    block: NDArray[np.int64]  # 0 is the head, 1 and on are tail blocks
    sample: NDArray[np.int64]  # row of the block's sample_idx


class Stream:
    """Samples by position, endless: one order, or a blend of several.

    Args:
        orders: one per dataset.
        blend: how they are mixed; None for a single one.
    """

    def __init__(self, orders: Sequence[PackedOrder], blend: Blend | None) -> None:
        self.orders = tuple(orders)
        self.blend = blend
        self.seq_length = orders[0].tail_shape.seq_length
        self.dtype: np.dtype[Any] = np.result_type(*(order.dataset.dtype for order in orders))

    def __len__(self) -> int:
        """Return the length of NeoX's dataset; positions from there on are fine too."""
        return sum(order.head_length for order in self.orders)

    def __bool__(self) -> bool:
        """Return True: also a stream with an empty head goes on for ever."""
        return True

    def locate(self, positions: ArrayLike) -> SampleRefs:
        """Return the samples at ``positions``.

        Raises:
            ValueError: a position is negative.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if self.blend is None:
            block, sample = self.orders[0].locate(positions)
            return SampleRefs(np.zeros(len(positions), dtype=np.int16), block, sample)
        dataset, index = self.blend.locate(positions)
        block = np.empty(len(positions), dtype=np.int64)
        sample = np.empty(len(positions), dtype=np.int64)
        for number, where in groups(dataset):
            block[where], sample[where] = self.orders[number].locate(index[where])
        return SampleRefs(dataset, block, sample)

    def read(self, positions: ArrayLike) -> NDArray[Any]:
        """Return the tokens at ``positions``: shape (len(positions), seq_length + 1), storage type.

        Any number of threads may read at the same time.

        Raises:
            ValueError: a position is negative.
        """
        refs = self.locate(positions)
        out = np.empty((len(refs.sample), self.seq_length + 1), dtype=self.dtype)
        for number, rows in groups(refs.dataset):
            order = self.orders[number]
            if order.dataset.dtype == self.dtype:
                order.read(refs.block[rows], refs.sample[rows], out, rows)
            else:  # a blend of files in different types
                part = np.empty((len(rows), out.shape[1]), dtype=order.dataset.dtype)
                order.read(refs.block[rows], refs.sample[rows], part, np.arange(len(rows)))
                out[rows] = part
        return out
