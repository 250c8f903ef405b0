"""The token bytes of a dataset: one ``P.bin``, or shards of it, read as one address space.

Shards are named ``P-00000-of-00132.bin`` to ``P-00132-of-00132.bin``: the last number is the last
index, as Pythia's files have it. A cut may fall anywhere, also inside a token.
"""

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.stream import compiled

__all__ = ["Shard", "TokenBytes", "find_shards"]

_SHARD_SUFFIX = re.compile(r"-(\d{5})-of-(\d{5})\.bin$")


@dataclass(frozen=True)
class Shard:
    """One physical file and the half-open byte range of the dataset that it holds."""

    path: Path
    start: int
    stop: int


def find_shards(prefix: str) -> list[Path]:
    """Return the token files of ``prefix`` in order; empty if there are none.

    Raises:
        DatasetError: shards are missing, or those of two different cuts lie side by side.
    """
    whole = Path(prefix + ".bin")
    if whole.exists():
        return [whole]
    found: dict[int, dict[int, Path]] = {}
    for name in glob.glob(glob.escape(prefix) + "-*-of-*.bin"):
        match = _SHARD_SUFFIX.search(name)
        if match is not None and name[: match.start()] == prefix:
            found.setdefault(int(match[2]), {})[int(match[1])] = Path(name)
    if not found:
        return []
    if len(found) > 1:
        lasts = " and ".join(f"-of-{last:05d}" for last in sorted(found))
        raise DatasetError(f"{prefix}: shards of different cuts ({lasts}); keep one set")
    last, shards = next(iter(found.items()))
    for index in range(last + 1):
        if index not in shards:
            raise DatasetError(
                f"{prefix}: {len(shards)} of {last + 1} shards are there; the first missing one "
                f"is {prefix}-{index:05d}-of-{last:05d}.bin"
            )
    return [shards[index] for index in range(last + 1)]


class TokenBytes:
    """Read-only bytes ``[0, size)`` over one or several files, mapped when first touched."""

    def __init__(self, paths: Sequence[Path]) -> None:
        shards = []
        start = 0
        for path in paths:
            stop = start + path.stat().st_size
            shards.append(Shard(path, start, stop))
            start = stop
        self.shards: tuple[Shard, ...] = tuple(shards)
        self.size = start
        self.starts = np.array([shard.start for shard in shards], dtype=np.int64)  # bytes
        self._maps: dict[int, NDArray[np.uint8]] = {}

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return bytes ``[start, stop)``: a view where one shard holds them, else a copy.

        Raises:
            ValueError: the range leaves the dataset.
        """
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"bytes {start}..{stop} are outside of 0..{self.size}")
        first = self._shard_at(start)
        shard = self.shards[first]
        if stop <= shard.stop:
            return self._map(first)[start - shard.start : stop - shard.start]
        out = np.empty(stop - start, dtype=np.uint8)
        at = np.zeros(1, dtype=np.int64)
        self.gather(np.array([start]), at, np.array([stop - start]), out)
        return out

    def gather(
        self,
        starts: NDArray[np.int64],
        targets: NDArray[np.int64],
        sizes: NDArray[np.int64],
        out: NDArray[Any],
    ) -> None:
        """Copy spans of bytes into ``out``; the interpreter lock is released meanwhile.

        Args:
            starts: byte offsets in the dataset, shape (num_spans,).
            targets: byte offsets in ``out``, shape (num_spans,).
            sizes: bytes, shape (num_spans,).
            out: contiguous array of any type.

        Raises:
            ValueError: a span leaves the dataset or ``out``.
        """
        if len(self.shards) == 1:
            compiled.copy_spans(self._map(0), out, starts, targets, sizes)
            return
        stops = starts + sizes
        first, last = self.shards_of(starts, stops)
        if len(starts) and (starts.min() < 0 or stops.max() > self.size):
            raise ValueError("a span leaves the dataset")
        for index in range(int(first.min(initial=0)), int(last.max(initial=-1)) + 1):
            shard = self.shards[index]
            chosen = np.flatnonzero((first <= index) & (index <= last) & (sizes > 0))
            if not len(chosen):
                continue
            begin = np.maximum(starts[chosen], shard.start)
            end = np.minimum(stops[chosen], shard.stop)
            target = targets[chosen] + (begin - starts[chosen])
            compiled.copy_spans(self._map(index), out, begin - shard.start, target, end - begin)

    def shards_of(
        self, starts: NDArray[np.int64], stops: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the indices of the first and the last shard that hold each span of bytes."""
        first = np.searchsorted(self.starts, starts, side="right") - 1
        last = np.searchsorted(self.starts, np.maximum(stops - 1, starts), side="right") - 1
        return first, last

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (index of a shard, first byte in it, byte after the last) of ``[start, stop)``."""
        for index in range(self._shard_at(start), len(self.shards)):
            shard = self.shards[index]
            if shard.start >= stop:
                return
            if start < shard.stop:
                yield index, max(start - shard.start, 0), min(stop, shard.stop) - shard.start

    def warm_up(self) -> None:
        """Read every shard once, so that the page cache holds what fits."""
        for shard in self.shards:
            with open(shard.path, "rb") as file:
                while file.read(64 << 20):
                    pass

    def _shard_at(self, start: int) -> int:
        return max(0, int(np.searchsorted(self.starts, start, side="right")) - 1)

    def _map(self, index: int) -> NDArray[np.uint8]:
        mapped = self._maps.get(index)
        if mapped is None:
            shard = self.shards[index]
            if shard.start == shard.stop:  # an empty file cannot be mapped
                mapped = np.zeros(0, dtype=np.uint8)
            else:
                mapped = np.memmap(shard.path, dtype=np.uint8, mode="r").view(np.ndarray)
            self._maps[index] = mapped
        return mapped
