"""From what a configuration asks for to descriptions of orders, new ones and continued ones."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron.base.errors import ConfigError, DatasetError
from megatron.stream.blending import normalised, weights_by_num_documents
from megatron.stream.identity import DatasetIdentity
from megatron.stream.index_maps import count_tokens, epochs_needed
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.opening import (
    LocateDataset,
    MapName,
    OrderPlan,
    open_order,
    open_order_alone,
)
from megatron.stream.order_description import ComponentDescription, OrderDescription
from megatron.stream.sample_counts import SplitCounts, samples_per_dataset, split_documents
from megatron.stream.sequential_order import require_rows
from megatron.stream.stream_settings import (
    SPLITS,
    DatasetFiles,
    Split,
    StreamSettings,
    dataset_files,
)

__all__ = [
    "blended_continuation",
    "describe_streams",
    "epoch_samples",
    "map_names",
    "open_order",
    "open_order_alone",
]


def describe_streams(
    settings: StreamSettings,
    requested: SplitCounts,
    identities: Mapping[DatasetFiles, DatasetIdentity],
) -> dict[Split, OrderDescription | None]:
    """Return the orders of a new run, with NeoX's heads; None where there is no such stream.

    Args:
        settings: data keys.
        requested: samples per split (None: one epoch; 0: no stream).
        identities: of all datasets, as ``identify_datasets`` gives them.

    Raises:
        ConfigError: keys that contradict each other.
        DatasetError: a dataset cannot be used.
    """
    described = _describe(settings, requested, identities)
    return {split: None if one is None else one.order for split, one in described.items()}


def map_names(
    settings: StreamSettings,
    requested: SplitCounts,
    identities: Mapping[DatasetFiles, DatasetIdentity],
) -> dict[Split, dict[str, MapName]]:
    """Return how NeoX would call the index maps of each component, by component key.

    The arguments are those of :func:`describe_streams`. Names are no part of an order: they carry
    the number of samples asked for, and only help to find files.
    """
    described = _describe(settings, requested, identities)
    return {split: {} if one is None else one.names for split, one in described.items()}


def blended_continuation(
    wanted: OrderDescription,
    earlier: Iterable[OrderDescription],
    cursors: Mapping[str, int],
    *,
    added_begin_with: Literal["head", "tail"] = "tail",
) -> OrderDescription:
    """Return the order in which a stream goes on when its datasets or weights have changed.

    Every component drawn from before goes on from its cursor, with the head it began with; also
    one that was left out for a while.

    Args:
        wanted: the order of a new run.
        earlier: the stream's orders so far.
        cursors: next position of every component ever drawn from, by key.
        added_begin_with: how a component starts that was never drawn from: NeoX's head (validation
            streams) or tail block 1.

    Raises:
        DatasetError: no earlier order tells of a component that has a cursor.
    """
    known = {component.key: component for order in earlier for component in order.components}

    def continued(component: ComponentDescription) -> ComponentDescription:
        if component.key not in cursors:
            return component if added_begin_with == "head" else component.without_head()
        if component.key not in known:
            raise DatasetError(
                f"there is a cursor of {component.key}, but no earlier order draws from it"
            )
        return component.continued(known[component.key], cursors[component.key])

    return replace(wanted, components=tuple(map(continued, wanted.components)))


def epoch_samples(description: OrderDescription, locate_dataset: LocateDataset) -> dict[str, int]:
    """Return how many samples one pass over each component's documents gives, by component key.

    With ``pack_until_overflow`` that depends on how documents are shuffled; those of tail block 1
    are returned.
    """
    return OrderPlan.of(description, locate_dataset).epoch_samples


@dataclass(frozen=True)
class _Described:
    order: OrderDescription
    names: dict[str, MapName]  # by component key


@dataclass(frozen=True)
class _Part:
    """One component before its order exists."""

    dataset: IndexedDataset
    identity: DatasetIdentity
    documents: range
    name: str  # in NeoX's cache files
    num_samples: int | None  # requested


def _describe(
    settings: StreamSettings,
    requested: SplitCounts,
    identities: Mapping[DatasetFiles, DatasetIdentity],
) -> dict[Split, _Described | None]:
    settings.require_consistent()
    opened: dict[str, IndexedDataset] = {}
    counts = dict(zip(SPLITS, (requested.train, requested.valid, requested.test), strict=True))
    described: dict[Split, _Described | None] = {}
    for number, (split, group) in enumerate(dataset_files(settings).items()):
        count = counts[split]
        if not group or count == 0:
            described[split] = None
            continue
        datasets = [_dataset(files.prefix, opened) for files in group]
        if settings.data_path is None:
            described[split] = _blend(
                settings, split, datasets, [identities[f] for f in group], count
            )
            continue
        documents = split_documents(settings.split, len(datasets[0]))[number]
        part = _Part(datasets[0], identities[group[0]], documents, split, count)
        described[split] = _order(settings, [part], None) if documents else None
    return described


def _dataset(prefix: str, opened: dict[str, IndexedDataset]) -> IndexedDataset:
    if prefix not in opened:
        dataset = IndexedDataset(prefix)
        if dataset.dtype.kind not in "iu":
            raise DatasetError(f"{prefix} holds {dataset.dtype}; tokens must be integers")
        opened[prefix] = dataset
    return opened[prefix]


def _blend(
    settings: StreamSettings,
    split: Split,
    datasets: Sequence[IndexedDataset],
    identities: Sequence[DatasetIdentity],
    num_samples: int | None,
) -> _Described:
    weights: Sequence[float] | None = getattr(settings, f"{split}_data_weights")
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
    parts = [
        _Part(dataset, identity, range(len(dataset)), f"{split}_{index}", count)
        for index, (dataset, identity, count) in enumerate(
            zip(datasets, identities, counts, strict=True)
        )
    ]
    return _order(settings, parts, weights)


def _order(
    settings: StreamSettings, parts: Sequence[_Part], weights: Sequence[float] | None
) -> _Described:
    packing = settings.packing
    occurrences: Counter[tuple[str, range]] = Counter()
    components = []
    names = {}
    for part in parts:
        place = (part.identity.digest, part.documents)
        component = ComponentDescription(
            dataset=part.identity.digest,
            first_document=part.documents.start,
            stop_document=part.documents.stop,
            occurrence=occurrences[place],
            head_epochs=_head_epochs(settings, part),
            head_samples=None if packing in ("packed", "sequential") else part.num_samples,
        )
        occurrences[place] += 1
        components.append(component)
        # Of documents that aren't cut NeoX reads others here: those at the file's beginning.
        if packing == "packed" or part.documents.start == 0:
            names[component.key] = MapName(
                name=part.name,
                num_samples=part.num_samples,
                allow_chopped=settings.allow_chopped,
                head_epochs=component.head_epochs,
            )
    order = OrderDescription(
        components=tuple(components),
        weights=None if weights is None else tuple(weights),
        seq_length=settings.seq_length,
        seed=settings.seed,
        packing=packing,
        # Packed samples and whole rows don't depend on it.
        allow_chopped=settings.allow_chopped or packing in ("packed", "sequential"),
    )
    return _Described(order, names)


def _head_epochs(settings: StreamSettings, part: _Part) -> int | None:
    if settings.packing == "sequential":
        require_rows(part.dataset, part.documents, settings.seq_length)
        return 1
    tokens = count_tokens(part.dataset.sizes, part.documents)
    if tokens == 0:
        raise DatasetError(
            f"{part.dataset.prefix} ({part.name}): {len(part.documents)} documents without tokens"
        )
    if settings.packing != "packed":
        return None
    if part.num_samples is None:
        return 1
    return epochs_needed(tokens, settings.seq_length, part.num_samples)
