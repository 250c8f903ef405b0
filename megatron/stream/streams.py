"""Opening what the configuration names as training, validation and test data."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.base.errors import ConfigError, DatasetError
from megatron.stream.blending import Blend, normalised, weights_by_num_documents
from megatron.stream.index_map_files import (
    MapRequest,
    build_map_files,
    neox_stems,
    open_map_files,
    open_or_build_maps,
)
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
from megatron.stream.sample_stream import Stream

__all__ = ["SplitCounts", "Stream", "StreamSettings", "Streams", "open_streams"]

_TAIL_BYTES_IN_MEMORY = 64 << 20  # a larger tail block is kept in files that all readers share


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
    try:
        if is_builder:
            for plan in plans:
                plan.build_files()
    finally:
        barrier()  # also on an error, so that the others fail too instead of waiting
    return Streams(*(plan.open() for plan in plans))


@dataclass(frozen=True)
class _Component:
    """One dataset of a stream before its index maps exist."""

    dataset: IndexedDataset
    name: str
    request: MapRequest

    def open(self) -> PackedOrder:
        return PackedOrder(
            self.dataset,
            head=open_map_files(self.request),
            tail_shape=self._tail_shape,
            tail_maps=self._tail_maps,
        )

    @property
    def _tail_shape(self) -> PackedShape:
        shape = self.request.shape
        epochs = epochs_needed(shape.tokens_per_epoch, shape.seq_length, num_samples=1)
        return dataclasses.replace(shape, num_epochs=epochs)

    def _tail_maps(self, block: int) -> PackedMaps:
        shape = self._tail_shape
        seed = tail_seed(self.request.seed, block)
        if shape.size_bytes <= _TAIL_BYTES_IN_MEMORY:
            return build_packed_maps(self.dataset.sizes, shape, seed)
        # The documents are in the name: runs with different splits don't take turns at one file.
        stem = (
            f"{self.dataset.prefix}_{self.name}_tail{block}_"
            f"{shape.documents.start}-{shape.documents.stop}docs_"
            f"{shape.seq_length}sl_{self.request.seed}s_packedpi"
        )
        return open_or_build_maps(MapRequest(self.dataset.index, shape, seed, stem))


@dataclass(frozen=True)
class _Plan:
    """One stream before its index maps exist; no components: no stream."""

    split: str
    components: tuple[_Component, ...] = ()
    blend: Blend | None = None

    def build_files(self) -> None:
        for component in self.components:
            build_map_files(component.request)
        if self.blend is not None:
            num_draws = sum(component.request.shape.num_samples for component in self.components)
            # Without the file every reader draws from the start, as often as it starts.
            with contextlib.suppress(OSError):
                self.blend.save_counts(self._counts_path(self.blend), num_draws)

    def open(self) -> Stream | None:
        if not self.components:
            return None
        if self.blend is not None:
            self.blend.load_counts(self._counts_path(self.blend))
        return Stream([component.open() for component in self.components], self.blend)

    def _counts_path(self, blend: Blend) -> Path:
        prefix = self.components[0].dataset.prefix
        return Path(f"{prefix}_{self.split}_blend_{blend.name}.counts")


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
    if settings.train_epochs is not None:
        if settings.weight_by_num_documents:
            problems.append("train_epochs does not go together with weight_by_num_documents")
        if any(weight != 1.0 for weight in settings.train_data_weights or ()):
            problems.append(
                f"train_epochs needs equal weights, got train_data_weights="
                f"{list(settings.train_data_weights or ())}; leave them out"
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
            _Plan(name, (_component(settings, single, name, documents, count),))
            if documents and count != 0
            else _Plan(name)
            for name, documents, count in zip(names, splits, wanted, strict=True)
        ]
    paths = (settings.train_data_paths, settings.valid_data_paths, settings.test_data_paths)
    weights = (settings.train_data_weights, settings.valid_data_weights, settings.test_data_weights)
    return [
        _blended_plan(settings, name, [dataset(path) for path in group], given, count)
        if group and count != 0
        else _Plan(name)
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
        split,
        tuple(
            _component(settings, dataset, f"{split}_{index}", range(len(dataset)), count)
            for index, (dataset, count) in enumerate(zip(datasets, counts, strict=True))
        ),
        Blend(weights),
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
    stem, v1_stem = neox_stems(
        dataset.prefix,
        name,
        num_samples=num_samples,
        seq_length=settings.seq_length,
        seed=settings.seed,
        allow_chopped=settings.allow_chopped,
    )
    request = MapRequest(dataset.index, shape, settings.seed, stem, other_stems=(v1_stem,))
    return _Component(dataset, name, request)


def _open_tokens(path: str, *, warm_up: bool) -> IndexedDataset:
    dataset = IndexedDataset(path, warm_up=warm_up)
    if dataset.dtype.kind not in "iu":
        raise DatasetError(f"{path} holds {dataset.dtype}; tokens must be integers")
    return dataset
