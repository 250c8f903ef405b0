"""In which order several datasets are drawn from: NeoX's greedy rule, going on without end.

At draw ``n`` the dataset furthest behind its share ``weight * max(n, 1)`` is next; the lowest
index wins a tie. The rule is sequential, so the counts before every 65,536th draw are kept, and
any position is found by drawing at most that many.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import ConfigError
from megatron.stream import compiled
from megatron.stream.grouping import groups

__all__ = ["Blend", "normalised", "weights_by_num_documents"]

DRAWS_PER_CHUNK = 65536
_MAX_DATASETS = np.iinfo(np.int16).max
_CHUNKS_IN_MEMORY = 16
_COUNTS_MAGIC = b"NXBLEND1"  # then SHA-256 of the rest, then int64 rows of counts


def normalised(weights: Sequence[float]) -> list[float]:
    """Divide ``weights`` by their sum, added from left to right as NeoX does.

    Raises:
        ConfigError: a weight is negative, or all are 0.
    """
    total = 0.0
    for weight in weights:
        total += weight
    if not total > 0.0 or min(weights) < 0.0:
        raise ConfigError(f"dataset weights {list(weights)} must be at least 0 and not all 0")
    return [weight / total for weight in weights]


def weights_by_num_documents(num_documents: Sequence[int], alpha: float) -> list[float]:
    """Return NeoX's weights under ``weight_by_num_documents``.

    A dataset's share of the documents, to the power of ``alpha``, is damped by the share of all
    the others: small alpha favours small datasets.
    """
    if len(num_documents) == 1:
        return [1.0]
    total = sum(num_documents)
    shares = [count / total for count in num_documents]
    smoothed = normalised([share**alpha for share in shares])
    return normalised(
        [weight * (1 - share) for weight, share in zip(smoothed, shares, strict=True)]
    )


class Blend:
    """Which dataset each position draws from, and the how-manieth of that dataset's samples.

    Args:
        weights: relative weights, one per dataset.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not 1 <= len(weights) <= _MAX_DATASETS:
            raise ConfigError(f"a blend has 1 to {_MAX_DATASETS} datasets, not {len(weights)}")
        self.weights = np.array(weights, dtype=np.float64)
        self.weights /= self.weights.sum()
        # Row k: samples of each dataset drawn before draw k * DRAWS_PER_CHUNK.
        self._counts = np.zeros((1, len(weights)), dtype=np.int64)
        self._chunks: OrderedDict[int, tuple[NDArray[np.int16], NDArray[np.int64]]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_datasets(self) -> int:
        """Datasets in the blend."""
        return len(self.weights)

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Return (dataset index, position within that dataset's order) of each position.

        Raises:
            ValueError: a position is negative.
        """
        if len(positions) and int(positions.min()) < 0:
            raise ValueError(f"positions must be >= 0, got {positions.min()}")
        if self.num_datasets == 1:
            return np.zeros(len(positions), dtype=np.int16), positions
        chunks, offsets = np.divmod(positions, DRAWS_PER_CHUNK)
        datasets = np.empty(len(positions), dtype=np.int16)
        samples = np.empty(len(positions), dtype=np.int64)
        for chunk, where in groups(chunks):
            drawn_datasets, drawn_samples = self._chunk(chunk)
            datasets[where] = drawn_datasets[offsets[where]]
            samples[where] = drawn_samples[offsets[where]]
        return datasets, samples

    def counts(self, position: int) -> NDArray[np.int64]:
        """Return how many of the first ``position`` draws each dataset gave."""
        if self.num_datasets == 1:
            return np.array([position], dtype=np.int64)
        chunk, offset = divmod(position, DRAWS_PER_CHUNK)
        if offset == 0:
            with self._lock:
                self._extend(chunk)
            drawn = np.zeros(self.num_datasets, dtype=np.int64)
        else:
            datasets, _ = self._chunk(chunk)
            drawn = np.bincount(datasets[:offset], minlength=self.num_datasets)
        drawn += self._counts[chunk]
        return drawn

    def positions(self, dataset: int, samples: NDArray[np.int64], stop: int) -> NDArray[np.int64]:
        """Return the positions that draw a dataset's samples; the inverse of :meth:`locate`.

        Args:
            dataset: index of the dataset.
            samples: how-manieth of its samples, from 0; ascending.
            stop: all of them are drawn before this position.

        Raises:
            ValueError: they are not.
        """
        if len(samples) and samples[-1] >= (drawn := int(self.counts(stop)[dataset])):
            raise ValueError(
                f"dataset {dataset} gives {drawn} samples before position {stop}, not "
                f"{samples[-1] + 1}"
            )
        if self.num_datasets == 1:
            return samples
        known = self._counts[: stop // DRAWS_PER_CHUNK + 1, dataset]
        chunks = np.searchsorted(known, samples, side="right") - 1
        positions = np.empty(len(samples), dtype=np.int64)
        for chunk, where in groups(chunks):
            datasets, _ = self._chunk(chunk)
            offsets = np.flatnonzero(datasets == dataset)
            index = samples[where] - self._counts[chunk, dataset]
            positions[where] = chunk * DRAWS_PER_CHUNK + offsets[index]
        return positions

    @property
    def name(self) -> str:
        """Sixteen hexadecimal digits that name the weights; equal weights draw equally."""
        weights = ",".join(weight.hex() for weight in self.weights.tolist())
        return hashlib.sha256(weights.encode()).hexdigest()[:16]

    def save_counts(self, path: Path, num_draws: int) -> None:
        """Keep the counts for the first ``num_draws`` positions in a file, if it has fewer yet.

        Raises:
            OSError: the file cannot be written.
        """
        if self.num_datasets == 1:
            return
        self.load_counts(path)
        num_chunks = -(-num_draws // DRAWS_PER_CHUNK)
        with self._lock:
            if len(self._counts) >= num_chunks and path.exists():
                return
            self._extend(max(0, num_chunks - 1))
            content = self._counts.tobytes()
        write_atomically(path, _COUNTS_MAGIC + hashlib.sha256(content).digest() + content)

    def load_counts(self, path: Path) -> None:
        """Take the counts that :meth:`save_counts` left; without them they are drawn again."""
        if self.num_datasets == 1 or not path.exists():
            return
        content = path.read_bytes()
        start = len(_COUNTS_MAGIC) + hashlib.sha256().digest_size
        digest, rows = content[len(_COUNTS_MAGIC) : start], content[start:]
        if not content.startswith(_COUNTS_MAGIC) or hashlib.sha256(rows).digest() != digest:
            return
        counts = np.frombuffer(rows, dtype=np.int64).reshape(-1, self.num_datasets)
        with self._lock:
            if len(counts) > len(self._counts):
                self._counts = counts

    def _chunk(self, chunk: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        with self._lock:
            drawn = self._chunks.get(chunk)
            if drawn is None:
                self._extend(chunk)
                drawn = self._draw(chunk, self._counts[chunk].copy())
                self._chunks[chunk] = drawn
                if len(self._chunks) > _CHUNKS_IN_MEMORY:
                    self._chunks.popitem(last=False)
            else:
                self._chunks.move_to_end(chunk)
            return drawn

    def _extend(self, chunk: int) -> None:
        known = len(self._counts)
        if chunk < known:
            return
        rows = np.empty((chunk + 1 - known, self.num_datasets), dtype=np.int64)
        counts = self._counts[-1].copy()
        for row in range(len(rows)):
            self._draw(known - 1 + row, counts)
            rows[row] = counts
        self._counts = np.concatenate([self._counts, rows])

    def _draw(
        self, chunk: int, counts: NDArray[np.int64]
    ) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Draw one chunk; ``counts`` go on from its begin to its end."""
        datasets = np.empty(DRAWS_PER_CHUNK, dtype=np.int16)
        samples = np.empty(DRAWS_PER_CHUNK, dtype=np.int64)
        compiled.draw_blend(self.weights, counts, chunk * DRAWS_PER_CHUNK, datasets, samples)
        return datasets, samples
