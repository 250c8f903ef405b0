"""Opening what the configuration names as training, validation and test data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron.base.errors import ConfigError, DatasetError
from megatron.stream.blending import Blend, normalised, weights_by_num_documents
from megatron.stream.index_map_files import MapRequest, build_map_files, open_map_files
from megatron.stream.index_maps import (
    PackedMaps,
    PackedShape,
    build_packed_maps,
    count_tokens,
    epochs_needed,
)
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.orders import PackedOrder, tail_seed
from megatron.stream.sample_counts import SplitCounts, samples_per_dataset, split_documents

__all__ = ["SampleRefs", "SplitCounts", "Stream", "StreamSettings", "Streams", "open_streams"]


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """The data keys of the configuration, by NeoX's names."""

    seq_length: int  # tokens a sample consumes
    seed: int
    data_path: str | None = None  # one dataset, divided by ``split``; or else the paths below
    split: str = "969, 30, 1"
    train_data_paths: tuple[str, ...] = ()
    valid_data_paths: tuple[str, ...] = ()
    test_data_paths: tuple[str, ...] = ()
    train_data_weights: tuple[float, ...] | None = None  # None: equal
    valid_data_weights: tuple[float, ...] | None = None
    test_data_weights: tuple[float, ...] | None = None
    weight_by_num_documents: bool = False
    weighted_sampler_alpha: float = 1.0
    pack_impl: str = "packed"
    allow_chopped: bool = True  # for packed data only a part of cache file names
    data_impl: str = "infer"
    mmap_warmup: bool = False
    train_epochs: int | None = None


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
        self.seq_length = orders[0].seq_length
        self.dtype: np.dtype[Any] = np.result_type(*(order.dataset.dtype for order in orders))

    def __len__(self) -> int:
        """Return the length of NeoX's dataset; positions from there on are fine too."""
        return sum(order.head_length for order in self.orders)

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
        for number in np.unique(dataset):
            chosen = np.flatnonzero(dataset == number)
            block[chosen], sample[chosen] = self.orders[number].locate(index[chosen])
        return SampleRefs(dataset, block, sample)

    def read(self, positions: ArrayLike) -> NDArray[Any]:
        """Return the tokens at ``positions``: shape (len(positions), seq_length + 1), storage type.

        Any number of threads may read at the same time.

        Raises:
            ValueError: a position is negative.
        """
        refs = self.locate(positions)
        out = np.empty((len(refs.sample), self.seq_length + 1), dtype=self.dtype)
        for number in np.unique(refs.dataset):
            order = self.orders[number]
            rows = np.flatnonzero(refs.dataset == number)
            if order.dataset.dtype == self.dtype:
                order.read(refs.block[rows], refs.sample[rows], out, rows)
            else:  # a blend of files in different types
                part = np.empty((len(rows), out.shape[1]), dtype=order.dataset.dtype)
                order.read(refs.block[rows], refs.sample[rows], part, np.arange(len(rows)))
                out[rows] = part
        return out


@dataclass(frozen=True)
class Streams:
    """The three streams; None where a split is empty or nothing is asked of it."""

    train: Stream | None
    valid: Stream | None
    test: Stream | None


def open_streams(
    settings: StreamSettings,
    requested: SplitCounts,
    *,
    is_builder: bool,
    barrier: Callable[[], None],
) -> Streams:
    """Open the three streams; index maps that are missing or stale are written first.

    Args:
        settings: data keys.
        requested: samples per split (None: one epoch; 0: no stream).
        is_builder: whether this process writes files; exactly one per file system does.
        barrier: waits for the builder; every process of the run's readers passes it once.

    Raises:
        ConfigError: keys that contradict each other or ask for what is not supported yet.
        DatasetError: a dataset or its index maps cannot be used.
    """
    _check(settings)
    plans = _plan(settings, requested)
    requests = [request for plan in plans for request in plan.requests]
    try:
        if is_builder:
            for request in requests:
                build_map_files(request)
    finally:
        barrier()  # also on an error, so that the others fail too instead of waiting
    return Streams(*(plan.open() for plan in plans))


@dataclass(frozen=True)
class _Component:
    """One dataset of a stream before its index maps exist."""

    dataset: IndexedDataset
    shape: PackedShape
    request: MapRequest

    def open(self) -> PackedOrder:
        shape, seed = self.shape, self.request.seed
        tail_shape = PackedShape(
            documents=shape.documents,
            tokens_per_epoch=shape.tokens_per_epoch,
            num_epochs=epochs_needed(shape.tokens_per_epoch, shape.seq_length, 1),
            seq_length=shape.seq_length,
        )

        def tail_maps(block: int) -> PackedMaps:
            return build_packed_maps(self.dataset.sizes, tail_shape, tail_seed(seed, block))

        head = open_map_files(self.request)
        return PackedOrder(self.dataset, shape.seq_length, head, tail_shape, tail_maps)


@dataclass(frozen=True)
class _Plan:
    """One stream before its index maps exist; no components: no stream."""

    components: tuple[_Component, ...] = ()
    weights: tuple[float, ...] | None = None

    @property
    def requests(self) -> list[MapRequest]:
        return [component.request for component in self.components]

    def open(self) -> Stream | None:
        if not self.components:
            return None
        blend = None if self.weights is None else Blend(self.weights)
        return Stream([component.open() for component in self.components], blend)


def _check(settings: StreamSettings) -> None:
    problems = []
    by_paths = (settings.train_data_paths, settings.valid_data_paths, settings.test_data_paths)
    if (settings.data_path is None) == (not any(by_paths)):
        problems.append("give either data_path or train_data_paths (with valid and test), not both")
    if settings.pack_impl != "packed":
        problems.append(f"pack_impl={settings.pack_impl} is known to NeoX, not supported here yet")
    if settings.data_impl not in ("infer", "mmap"):
        problems.append(
            f"data_impl={settings.data_impl}: the legacy format cannot be read; use mmap or infer"
        )
    if problems:
        raise ConfigError(*problems)


def _plan(settings: StreamSettings, requested: SplitCounts) -> list[_Plan]:
    opened: dict[str, IndexedDataset] = {}

    def dataset(path: str) -> IndexedDataset:
        if path not in opened:
            opened[path] = _open_tokens(path, warm_up=settings.mmap_warmup)
        return opened[path]

    wanted = (requested.train, requested.valid, requested.test)
    names = ("train", "valid", "test")
    if settings.data_path is not None:
        single = dataset(settings.data_path)
        splits = split_documents(settings.split, len(single))
        return [
            _Plan((_component(settings, single, name, documents, count),))
            if documents and count != 0
            else _Plan()
            for name, documents, count in zip(names, splits, wanted, strict=True)
        ]
    paths = (settings.train_data_paths, settings.valid_data_paths, settings.test_data_paths)
    weights = (settings.train_data_weights, settings.valid_data_weights, settings.test_data_weights)
    return [
        _blended_plan(settings, name, [dataset(path) for path in group], given, count)
        if group and count != 0
        else _Plan()
        for name, group, given, count in zip(names, paths, weights, wanted, strict=True)
    ]


def _blended_plan(
    settings: StreamSettings,
    split: str,
    datasets: Sequence[IndexedDataset],
    weights: Sequence[float] | None,
    num_samples: int | None,
) -> _Plan:
    if weights is None:
        weights = [1.0] * len(datasets)
    if len(weights) != len(datasets):
        raise ConfigError(
            f"{split}_data_weights has {len(weights)} weights for {len(datasets)} datasets"
        )
    if settings.weight_by_num_documents:
        num_documents = [len(dataset) for dataset in datasets]
        weights = weights_by_num_documents(num_documents, settings.weighted_sampler_alpha)
    weights = normalised(weights)
    counts: Sequence[int | None] = [None] * len(datasets)
    if num_samples is not None:
        counts = samples_per_dataset(num_samples, weights)
    return _Plan(
        tuple(
            _component(settings, dataset, f"{split}_{index}", range(len(dataset)), count)
            for index, (dataset, count) in enumerate(zip(datasets, counts, strict=True))
        ),
        tuple(weights),
    )


def _component(
    settings: StreamSettings,
    dataset: IndexedDataset,
    name: str,
    documents: range,
    num_samples: int | None,
) -> _Component:
    tokens = count_tokens(dataset.sizes, documents)
    if tokens == 0:
        raise DatasetError(f"{dataset.prefix} ({name}): {len(documents)} documents without tokens")
    num_epochs = 1
    if num_samples is not None:
        num_epochs = epochs_needed(tokens, settings.seq_length, num_samples)
    shape = PackedShape(documents, tokens, num_epochs, settings.seq_length)
    v1_stem = (
        f"{dataset.prefix}_{name}_indexmap_{num_samples}ns_{settings.seq_length}sl_{settings.seed}s"
    )
    stem = f"{v1_stem}_{settings.pack_impl}pi" + ("_ac" if settings.allow_chopped else "")
    request = MapRequest(dataset.index, shape, settings.seed, stem, other_stems=(v1_stem,))
    return _Component(dataset, shape, request)


def _open_tokens(path: str, *, warm_up: bool) -> IndexedDataset:
    dataset = IndexedDataset(path, warm_up=warm_up)
    if dataset.dtype.kind not in "iu":
        raise DatasetError(f"{path} holds {dataset.dtype}; tokens must be integers")
    return dataset
