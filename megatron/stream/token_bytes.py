"""The token bytes of a dataset, in one file or in shards, read as one address space."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.stream import compiled
from megatron.stream.shard_layout import Shard

__all__ = ["TokenBytes"]


class TokenBytes:
    """Read-only bytes ``[0, size)`` over one or several files, mapped when first touched.

    A file that isn't there is missed when bytes of it are read.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards: tuple[Shard, ...] = tuple(shards)
        self.size = self.shards[-1].stop if self.shards else 0
        self.starts = np.array([shard.start for shard in shards], dtype=np.int64)  # bytes
        self._maps: dict[int, NDArray[np.uint8]] = {}
        # What compiled code reads: where each file is mapped (0: not yet), and its bytes.
        self._addresses = np.zeros(len(shards), dtype=np.int64)
        self._bounds = np.append(self.starts, np.int64(self.size))

    @classmethod
    def of_files(cls, paths: Iterable[Path]) -> Self:
        """Return the bytes of existing files, one after the other."""
        shards = []
        start = 0
        for path in paths:
            stop = start + path.stat().st_size
            shards.append(Shard(path, start, stop))
            start = stop
        return cls(shards)

    @property
    def missing(self) -> tuple[Shard, ...]:
        """Files that weren't there when the dataset was opened."""
        return tuple(shard for shard in self.shards if not shard.is_there)

    def require_all(self) -> None:
        """Check that no file is missing, for what reads all of them.

        Raises:
            DatasetError: one is.
        """
        for index, shard in enumerate(self.shards):
            if not shard.path.exists():
                raise self._absence(index)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return bytes ``[start, stop)``: a view where one shard holds them, else a copy.

        Raises:
            DatasetError: a file that is needed is missing.
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
            DatasetError: a file that is needed is missing.
            ValueError: a span leaves the dataset or ``out``.
        """
        while (
            index := compiled.copy_from_files(
                self._addresses, self._bounds, out, starts, targets, sizes
            )
        ) >= 0:
            self._map(index)  # then all over: files are mapped once, and mostly few at a time

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
        """Read every shard that is there once, so that the page cache holds what fits."""
        for shard in self.shards:
            if not shard.is_there:
                continue
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
                mapped = self._map_file(index)
            # Of threads that come at once the first one's map stays: others read from its address.
            mapped = self._maps.setdefault(index, mapped)
            self._addresses[index] = mapped.ctypes.data if len(mapped) else 0
        return mapped

    def _map_file(self, index: int) -> NDArray[np.uint8]:
        shard = self.shards[index]
        try:
            size_bytes = shard.path.stat().st_size
        except FileNotFoundError:
            raise self._absence(index) from None
        if size_bytes != shard.stop - shard.start:  # one that came later may still be copied
            raise DatasetError(
                f"{shard.path} has {size_bytes} bytes now; it holds bytes {shard.start}.."
                f"{shard.stop} of the dataset, {shard.stop - shard.start} in number: copy it again"
            )
        return np.memmap(shard.path, dtype=np.uint8, mode="r").view(np.ndarray)

    def _absence(self, index: int) -> DatasetError:
        shard = self.shards[index]
        if len(self.shards) == 1:
            prefix = str(shard.path).removesuffix(".bin")
            return DatasetError(
                f"dataset {prefix}: {shard.path} does not exist; a dataset is named by its path "
                "without .bin and .idx"
            )
        num_missing = sum(not one.path.exists() for one in self.shards)
        return DatasetError(
            f"{shard.path} does not exist ({num_missing} of {len(self.shards)} shards are missing) "
            f"and holds bytes {shard.start}..{shard.stop} of the dataset. `neox-ledger shards "
            "required-for A..B` lists the files that steps need"
        )
