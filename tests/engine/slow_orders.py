"""What a run must have read, worked out the slow way from the files' bytes.

Nothing of megatron is used. Where the code under test walks index maps, this lays the shuffled
documents end to end and cuts the line; where it computes cursors, this counts draws one by one.
Small data only.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

__all__ = [
    "Amounts",
    "SlowDataset",
    "SlowStream",
    "difference",
    "requested",
    "split_documents",
    "write_dataset",
    "write_files",
]


def write_dataset(prefix: Path, seed: int, *, documents: int = 40, longest: int = 64) -> Path:
    """Write documents of random tokens (ids 1..199, 0 ends each) as NeoX's two files."""
    random = np.random.RandomState(seed)
    sizes = random.randint(2, longest, documents).astype("<i4")
    tokens = random.randint(1, 200, sizes.sum()).astype("<u2")
    tokens[np.cumsum(sizes) - 1] = 0
    write_files(prefix, tokens, sizes)
    return prefix


def write_files(prefix: Path, tokens: np.ndarray, sizes: np.ndarray) -> None:
    """Write ``prefix.bin`` and ``prefix.idx``."""
    count = len(sizes)
    starts = (np.cumsum(sizes) - sizes) * 2
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(tokens.astype("<u2").tobytes())
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\0\0"
        + np.array([1], "<u8").tobytes()
        + bytes([8])  # uint16
        + np.array([count, count + 1], "<u8").tobytes()
        + sizes.astype("<i4").tobytes()
        + starts.astype("<i8").tobytes()
        + np.arange(count + 1).astype("<i8").tobytes()
    )


def split_documents(split: str, documents: int) -> list[range]:
    """Return the documents of train, valid and test."""
    shares = [float(text) for text in split.split(",")]
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / sum(shares) * documents))
    excess = bounds[3] - documents
    bounds[1:] = [bound - excess for bound in bounds[1:]]
    return [range(first, stop) for first, stop in itertools.pairwise(bounds)]


class SlowDataset:
    """Samples of some documents of a dataset, as arrays of indices into its tokens.

    Args:
        prefix: of its files, read now and not again.
        seq_length: tokens that a sample consumes.
        seed: of the run.
        head_samples: that NeoX would ask for in the first launch; None: begins with tail block 1.
        documents: all if None.
    """

    def __init__(
        self,
        prefix: Path,
        seq_length: int,
        seed: int,
        head_samples: int | None,
        documents: range | None = None,
    ) -> None:
        index = Path(f"{prefix}.idx").read_bytes()
        count = int.from_bytes(index[18:26], "little")
        self.sizes = np.frombuffer(index, "<i4", count, 34).astype(int)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.tokens = np.frombuffer(Path(f"{prefix}.bin").read_bytes(), "<u2").astype("<i8")
        self.seq_length = seq_length
        self.seed = seed
        self.documents = range(count) if documents is None else documents
        self.drawn = 0  # the cursor
        self._rows: list[np.ndarray] = []
        self._blocks = 0
        if head_samples is not None:
            epochs = 1
            while self._samples_in(epochs) < head_samples:
                epochs += 1
            rows = self._shuffled(np.random.RandomState(seed), epochs)
            self._rows += rows[:-1]  # NeoX never reads the last one

    def next(self) -> np.ndarray:
        """Return the next sample."""
        while self.drawn >= len(self._rows):
            self._blocks += 1
            state = np.random.SeedSequence([self.seed, self._blocks]).generate_state(1)[0]
            self._rows += self._shuffled(np.random.RandomState(state), 1)
        self.drawn += 1
        return self._rows[self.drawn - 1]

    @property
    def samples_per_epoch(self) -> int:
        return self._samples_in(1)

    def document_of(self, token: int) -> int:
        return int(np.searchsorted(self.starts, token, side="right")) - 1

    def _samples_in(self, epochs: int) -> int:
        tokens = sum(self.sizes[document] for document in self.documents) * epochs
        return (int(tokens) - 1) // self.seq_length

    def _shuffled(self, random: np.random.RandomState, epochs: int) -> list[np.ndarray]:
        order = np.array(list(self.documents) * epochs)
        random.shuffle(order)
        line = np.concatenate(
            [np.arange(self.starts[one], self.starts[one] + self.sizes[one]) for one in order]
        )
        numbers = np.arange(self._samples_in(epochs))
        random.shuffle(numbers)
        length = self.seq_length
        return [line[number * length : number * length + length + 1] for number in numbers]


@dataclass
class SlowStream:
    """A stream as it is consumed: which datasets are drawn from, and how far it has come."""

    datasets: list[SlowDataset]
    weights: Sequence[float] = (1.0,)
    position: int = 0
    counts: list[int] = field(default_factory=list)

    def change(self, datasets: list[SlowDataset], weights: Sequence[float]) -> None:
        """Draw from other datasets, or in other proportions, from here on."""
        self.datasets, self.weights, self.counts = datasets, weights, []

    def draw(self) -> tuple[SlowDataset, np.ndarray]:
        """Return the next sample and the dataset it is of."""
        if not self.counts:
            self.counts = [0] * len(self.datasets)
        scale = max(float(sum(self.counts)), 1.0)
        total = sum(self.weights)
        errors = [
            weight / total * scale - count
            for weight, count in zip(self.weights, self.counts, strict=True)
        ]
        chosen = errors.index(max(errors))
        self.counts[chosen] += 1
        self.position += 1
        return self.datasets[chosen], self.datasets[chosen].next()

    def step(self, samples: int) -> tuple[int, int, str]:
        """Consume a step; return what its line must say: position, samples, digest."""
        first, digest = self.position, 0
        for position in range(first, first + samples):
            dataset, row = self.draw()
            digest += xxhash.xxh3_64_intdigest(dataset.tokens[row].tobytes(), seed=position)
        return first, samples, f"{digest % 2**64:016x}"

    def preview(self, samples: int) -> tuple[int, int, str]:
        """Return what :meth:`step` would, without consuming anything."""
        before = self.position, list(self.counts), [one.drawn for one in self.datasets]
        expected = self.step(samples)
        self.position, self.counts = before[0], before[1]
        for dataset, drawn in zip(self.datasets, before[2], strict=True):
            dataset.drawn = drawn
        return expected


@dataclass(frozen=True)
class Amounts:
    """Tokens, and documents with at least one of them."""

    tokens: int
    documents: int


def difference(
    old: Iterable[tuple[SlowDataset, np.ndarray]],
    new: Iterable[tuple[SlowDataset, np.ndarray]],
    *,
    is_same_content: bool,
) -> dict[str, Amounts]:
    """Count what the new samples repeat and skip of what the old ones would have read.

    A sample consumes its tokens but the last, which the next one begins with.
    """
    was, becomes = _consumed(old), _consumed(new)
    if is_same_content:
        return {
            "repeated": _amounts(becomes - was),
            "skipped": _amounts(was - becomes),
            "new": Amounts(0, 0),
        }
    return {
        "repeated": Amounts(0, 0),
        "skipped": _amounts(was),
        "new": _amounts(becomes),
    }


def requested(samples: int, weight: float) -> int:
    """Return what NeoX asks of one dataset of a blend."""
    return math.ceil(samples * weight * 1.005)


def _consumed(
    samples: Iterable[tuple[SlowDataset, np.ndarray]],
) -> Counter[tuple[int, int]]:
    return Counter(
        (dataset.document_of(token), int(token)) for dataset, row in samples for token in row[:-1]
    )


def _amounts(tokens: Counter[tuple[int, int]]) -> Amounts:
    return Amounts(tokens.total(), len({document for document, _ in tokens}))
