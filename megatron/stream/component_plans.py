"""How one component of an order is opened: its index maps, the names of their files, its tail."""

import functools
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np

from megatron.base.errors import DatasetError
from megatron.stream.index_map_files import (
    MapRequest,
    build_map_files,
    foreign_stems,
    neox_stems,
    open_or_build_maps,
)
from megatron.stream.index_maps import IndexMaps, PackedShape, count_tokens, epochs_needed
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.map_recipes import MapRecipe, PackedRecipe, RowRecipe, SequentialRecipe
from megatron.stream.mapped_order import MappedOrder
from megatron.stream.order_description import ComponentDescription, OrderDescription
from megatron.stream.orders import Order, TailBlocks, tail_seed
from megatron.stream.row_maps import RowRule, build_block, keeps, readable_head, rows_per_block
from megatron.stream.sequential_order import SequentialOrder, require_rows

__all__ = ["ComponentPlan", "MapName", "OpenMaps"]

_TAIL_BYTES_IN_MEMORY = 64 << 20  # a larger tail block is kept in files that all readers share

_Maps = TypeVar("_Maps")


class OpenMaps(Protocol):
    """Finds the maps of a head."""

    def __call__(self, request: MapRequest[_Maps], /) -> _Maps: ...


@dataclass(frozen=True)
class MapName:
    """How NeoX calls a component's index maps in a run of a certain length."""

    name: str  # train, or train_0 for the first of several datasets
    num_samples: int | None  # requested; None: one epoch
    allow_chopped: bool
    head_epochs: int | None  # of packed samples, which the maps must have to fit


@dataclass(frozen=True)
class ComponentPlan:
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
        """Samples of one pass; of ``pack_until_overflow`` those of tail block 1."""
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
        """Check the dataset, and check or write the files of the head.

        Raises:
            DatasetError: the dataset cannot be used, or nothing can be written.
        """
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

    def open(self, open_maps: OpenMaps) -> Order:
        """Return the component's order; ``open_maps`` finds the maps of its head."""
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
        num_read = 0
        if head is not None:
            num_read = head.num_samples if rule.packing == "unpacked" else len(head.doc_idx)
        return MappedOrder(
            self.dataset,
            self.order.seq_length,
            head=None if head is None else readable_head(rule, head),
            head_epochs=-(-num_read // int(kept.sum())),
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
