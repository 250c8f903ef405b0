"""From the description of an order to a stream that reads it, wherever its datasets lie now."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np

from megatron.base.errors import DatasetError
from megatron.stream.blending import Blend
from megatron.stream.index_map_files import (
    MapRequest,
    build_map_files,
    foreign_stems,
    neox_stems,
    open_map_files,
    open_or_build_maps,
)
from megatron.stream.index_maps import IndexMaps, PackedShape, count_tokens, epochs_needed
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.map_recipes import MapRecipe, PackedRecipe, RowRecipe, SequentialRecipe
from megatron.stream.mapped_order import MappedOrder
from megatron.stream.order_description import ComponentDescription, OrderDescription
from megatron.stream.orders import Order, TailBlocks, tail_seed
from megatron.stream.row_maps import RowRule, build_block, keeps, readable_head, rows_per_block
from megatron.stream.sample_stream import Stream
from megatron.stream.sequential_order import SequentialOrder, require_rows
from megatron.stream.stream_settings import DatasetFiles

__all__ = ["LocateDataset", "MapName", "OrderPlan", "open_order", "open_order_alone"]

_TAIL_BYTES_IN_MEMORY = 64 << 20  # a larger tail block is kept in files that all readers share

LocateDataset = Callable[[str], str | DatasetFiles]
"""From a dataset's identity to where it lies; a prefix alone if it has no labels."""

_Maps = TypeVar("_Maps")


class _OpenMaps(Protocol):
    """Finds the maps of a head."""

    def __call__(self, request: MapRequest[_Maps], /) -> _Maps: ...


@dataclass(frozen=True)
class MapName:
    """How NeoX calls a component's index maps in a run of a certain length."""

    name: str  # train, or train_0 for the first of several datasets
    num_samples: int | None  # requested; None: one epoch
    allow_chopped: bool
    head_epochs: int | None  # of packed samples, which the maps must have to fit


def open_order(
    description: OrderDescription,
    locate_dataset: LocateDataset,
    *,
    names: Mapping[str, MapName] | None = None,
    is_builder: bool,
    barrier: Callable[[], None],
    warm_up: bool = False,
) -> Stream:
    """Open an order; index maps that are missing or stale are written first.

    Args:
        description: of the order. It alone decides what is read.
        locate_dataset: where a dataset of this identity lies.
        names: NeoX's names for the index maps of a run like the one configured now, by component
            key; used where they fit the description.
        is_builder: whether this process writes files; exactly one per file system does.
        barrier: waits for the builder; every reading process passes it once.
        warm_up: read the datasets through once.

    Raises:
        DatasetError: a dataset or its index maps cannot be used.
    """
    plan = OrderPlan.of(description, locate_dataset, names=names, warm_up=warm_up)
    try:
        if is_builder:
            plan.build_files()
    finally:
        barrier()  # also on an error, so that the others fail too instead of waiting
    return plan.open()


def open_order_alone(
    description: OrderDescription,
    locate_dataset: LocateDataset,
    *,
    names: Mapping[str, MapName] | None = None,
) -> Stream:
    """Open an order in a process of its own, such as a query's.

    Index maps are used if they are there, else written; in a folder that cannot be written they are
    computed in memory.

    Raises:
        DatasetError: a dataset cannot be used.
    """
    return OrderPlan.of(description, locate_dataset, names=names).open(open_or_build_maps)


@dataclass(frozen=True)
class OrderPlan:
    """An order before its index maps exist."""

    description: OrderDescription
    components: tuple["_Component", ...]
    blend: Blend | None

    @classmethod
    def of(
        cls,
        description: OrderDescription,
        locate_dataset: LocateDataset,
        *,
        names: Mapping[str, MapName] | None = None,
        warm_up: bool = False,
    ) -> "OrderPlan":
        """Open the datasets that a description names.

        Raises:
            DatasetError: one is missing, or too short to be the one described.
        """
        opened: dict[str, IndexedDataset] = {}

        def dataset(prefix: str) -> IndexedDataset:
            if prefix not in opened:
                opened[prefix] = IndexedDataset(prefix, warm_up=warm_up)
            return opened[prefix]

        components = []
        for component in description.components:
            located = locate_dataset(component.dataset)
            files = DatasetFiles(located) if isinstance(located, str) else located
            components.append(
                _Component(
                    order=description,
                    described=component,
                    dataset=dataset(files.prefix),
                    labels=None if files.label is None else dataset(files.label),
                    name=(names or {}).get(component.key),
                )
            )
        weights = description.weights
        return cls(description, tuple(components), None if weights is None else Blend(weights))

    @property
    def epoch_samples(self) -> dict[str, int]:
        """Samples of one pass over each component's documents, by key.

        With ``pack_until_overflow`` those of the first tail block: they depend on the shuffle.
        """
        return {one.described.key: one.epoch_samples for one in self.components}

    def build_files(self) -> None:
        """Check or write the files that :meth:`open` needs."""
        for component in self.components:
            component.build_files()
        if self.blend is not None:
            # Without the file every reader draws from the start, as often as it starts.
            with contextlib.suppress(OSError):
                self.blend.save_counts(
                    self._counts_path(self.blend),
                    sum(component.usual_samples for component in self.components),
                )

    def open(self, open_maps: _OpenMaps = open_map_files) -> Stream:
        """Return the stream; ``open_maps`` finds the maps of the heads."""
        if self.blend is not None:
            self.blend.load_counts(self._counts_path(self.blend))
        orders = [component.open(open_maps) for component in self.components]
        return Stream(self.description, orders, self.blend)

    def _counts_path(self, blend: Blend) -> Path:
        return Path(f"{self.components[0].dataset.prefix}_blend_{blend.name}.counts")


@dataclass(frozen=True)
class _Component:
    """One component of an order before its index maps exist."""

    order: OrderDescription
    described: ComponentDescription
    dataset: IndexedDataset
    labels: IndexedDataset | None
    name: MapName | None

    def __post_init__(self) -> None:
        documents, num_documents = self.described.documents, len(self.dataset)
        if documents.stop > num_documents:
            raise DatasetError(
                f"{self.dataset.prefix} has {num_documents} documents, but the order reads "
                f"{documents.start}..{documents.stop - 1}: it is another dataset"
            )
        labels = self.labels
        if labels is not None and not np.array_equal(labels.sizes, self.dataset.sizes):
            raise DatasetError(
                f"{labels.prefix} cannot hold the labels of {self.dataset.prefix}: its documents "
                f"({len(labels)} of {int(labels.sizes.sum())} tokens in sum) do not have the same "
                f"sizes ({num_documents} of {int(self.dataset.sizes.sum())})"
            )
        if labels is not None and labels.dtype.kind not in "iu":
            raise DatasetError(f"{labels.prefix} holds {labels.dtype}; labels must be integers")

    @property
    def epoch_samples(self) -> int:
        if self.order.packing == "packed":
            return self._shape(1).num_samples
        if self.order.packing == "sequential":
            return len(self.described.documents)
        kept = keeps(self._rule, self.dataset, self.labels)
        return (
            rows_per_block(self._rule, kept)
            or build_block(self._rule, self.dataset.sizes, kept, self._seed(1)).num_samples
        )

    @property
    def usual_samples(self) -> int:
        """Samples of the head, or of a tail block where there is none; to be generous."""
        if self.order.packing == "packed":
            return self._shape(self.described.head_epochs or 1).num_samples
        return self.described.head_samples or len(self.described.documents)

    def build_files(self) -> None:
        documents = self.described.documents
        if self.order.packing == "sequential":
            require_rows(self.dataset, documents, self.order.seq_length)
            return
        tokens = count_tokens(self.dataset.sizes, documents)
        if tokens != self._tokens_per_epoch:
            raise DatasetError(
                f"{self.dataset.index.path}: documents {documents.start}..{documents.stop - 1} "
                f"have {tokens} tokens by their sizes and {self._tokens_per_epoch} by their "
                "offsets; copy or build it again"
            )
        request = self._head_request()
        if request is not None:
            build_map_files(request)

    def open(self, open_maps: _OpenMaps) -> Order:
        if self.order.packing == "sequential":
            return self._open_sequential()
        request = self._head_request()
        head = None if request is None else open_maps(request)
        return self._open_packed(head) if self.order.packing == "packed" else self._open_rows(head)

    def _open_packed(self, head: IndexMaps | None) -> Order:
        shape = self._shape(None)
        return MappedOrder(
            self.dataset,
            self.order.seq_length,
            head=head,
            head_epochs=self.described.head_epochs or 0,
            tail=TailBlocks(
                lambda block: self._tail_maps(
                    block,
                    PackedRecipe(self.dataset.sizes, shape, self._seed(block)),
                    shape.size_bytes,
                ),
                shape.num_samples,
            ),
            tail_epochs=shape.num_epochs,
            labels=self.labels,
        )

    def _open_rows(self, head: IndexMaps | None) -> Order:
        rule = self._rule
        kept = keeps(rule, self.dataset, self.labels)
        num_documents = len(rule.documents)
        return MappedOrder(
            self.dataset,
            self.order.seq_length,
            head=None if head is None else readable_head(rule, head),
            head_epochs=0 if head is None else -(-len(head.doc_idx) // int(kept.sum())),
            tail=TailBlocks(
                lambda block: self._tail_maps(
                    block,
                    RowRecipe(self.dataset, self.labels, rule, None, self._seed(block)),
                    32 * num_documents,
                ),
                rows_per_block(rule, kept) or (lambda maps: maps.num_samples),
            ),
            is_packed=False,
            labels=self.labels,
        )

    def _open_sequential(self) -> Order:
        documents, width = self.described.documents, self.order.seq_length + 1
        if self._tokens_per_epoch != len(documents) * width:
            require_rows(self.dataset, documents, self.order.seq_length)
        return SequentialOrder(
            self.dataset,
            documents,
            self.order.seq_length,
            has_head=self.described.head_epochs is not None,
            tail=TailBlocks(
                lambda block: self._tail_maps(
                    block, SequentialRecipe(documents, self._seed(block)), 4 * len(documents)
                ),
                len(documents),
            ),
            labels=self.labels,
        )

    def _seed(self, block: int) -> int:
        return tail_seed(self.order.seed, block)

    def _head_request(self) -> MapRequest[IndexMaps] | None:
        described, name = self.described, self.name
        recipe: MapRecipe[IndexMaps]
        if self.order.packing == "packed":
            if described.head_epochs is None:
                return None
            shape = self._shape(described.head_epochs)
            recipe = PackedRecipe(self.dataset.sizes, shape, self.order.seed)
            size, fits = f"{shape.num_epochs}ep", name and name.head_epochs == shape.num_epochs
        else:
            if described.head_samples is None:
                return None
            recipe = RowRecipe(
                self.dataset, self.labels, self._rule, described.head_samples, self.order.seed
            )
            size = f"{described.head_samples}ns"
            fits = name and name.num_samples == described.head_samples
        if name is None or not fits:
            return self._request(
                recipe,
                f"{self._stem('indexmap')}_{size}_{self._suffix}",
                is_name_kept=False,
                foreign=foreign_stems(
                    self.dataset.prefix,
                    seq_length=self.order.seq_length,
                    seed=self.order.seed,
                    packing=self.order.packing,
                    allow_chopped=self.order.allow_chopped,
                ),
            )
        stem, v1_stem = neox_stems(
            self.dataset.prefix,
            name.name,
            num_samples=name.num_samples,
            seq_length=self.order.seq_length,
            seed=self.order.seed,
            allow_chopped=name.allow_chopped,
            packing=self.order.packing,
        )
        others = (v1_stem,) if self.order.packing == "packed" else ()
        return self._request(recipe, stem, other_stems=others)

    def _tail_maps(self, block: int, recipe: MapRecipe[_Maps], size_bytes: int) -> _Maps:
        if size_bytes <= _TAIL_BYTES_IN_MEMORY:
            return recipe.build()
        stem = f"{self._stem(f'tail{block}')}_{self._suffix}"
        return open_or_build_maps(self._request(recipe, stem))

    def _stem(self, kind: str) -> str:
        # The documents are in the name: runs with different splits don't take turns at one file.
        documents = self.described.documents
        return f"{self.dataset.prefix}_{kind}_{documents.start}-{documents.stop}docs"

    @property
    def _suffix(self) -> str:
        order = self.order
        chopped = "_ac" if order.allow_chopped and self._is_cut_by_rule else ""
        return f"{order.seq_length}sl_{order.seed}s_{order.packing}pi{chopped}"

    @property
    def _is_cut_by_rule(self) -> bool:
        return self.order.packing in ("unpacked", "pack_until_overflow")

    def _request(self, recipe: MapRecipe[_Maps], stem: str, **others: Any) -> MapRequest[_Maps]:
        labels = self.labels
        return MapRequest(
            sources=(
                self.dataset.index.path,
                *(() if labels is None else (shard.path for shard in labels.tokens.shards)),
            ),
            recipe=recipe,
            stem=stem,
            identity=self.described.dataset,
            similar=f"{self.dataset.prefix}_",
            **others,
        )

    @property
    def _rule(self) -> RowRule:
        packing = cast(Literal["unpacked", "pack_until_overflow"], self.order.packing)
        return RowRule(
            packing, self.described.documents, self.order.seq_length, self.order.allow_chopped
        )

    def _shape(self, num_epochs: int | None) -> PackedShape:
        """Return the size of packed maps; None: as many epochs as a tail block has."""
        tokens, seq_length = self._tokens_per_epoch, self.order.seq_length
        if num_epochs is None:
            num_epochs = epochs_needed(tokens, seq_length, num_samples=1)
        return PackedShape(self.described.documents, tokens, num_epochs, seq_length)

    @functools.cached_property
    def _tokens_per_epoch(self) -> int:
        """Tokens of the documents by their offsets: reading all sizes takes a while."""
        documents, dataset = self.described.documents, self.dataset
        if not documents:
            return 0
        itemsize = dataset.dtype.itemsize
        end = int(dataset.pointers[documents.stop - 1]) + itemsize * int(
            dataset.sizes[documents.stop - 1]
        )
        return (end - int(dataset.pointers[documents.start])) // itemsize
