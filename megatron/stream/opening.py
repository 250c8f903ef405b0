"""From the description of an order to a stream that reads it, wherever its datasets lie now."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.stream.blending import Blend
from megatron.stream.component_plans import ComponentPlan, MapName, OpenMaps
from megatron.stream.index_map_files import open_map_files, open_or_build_maps
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.order_description import OrderDescription
from megatron.stream.sample_stream import Stream
from megatron.stream.stream_settings import DatasetFiles

__all__ = ["LocateDataset", "MapName", "OrderPlan", "open_order", "open_order_alone"]

LocateDataset = Callable[[str], str | DatasetFiles]
"""From a dataset's identity to where it lies; a prefix alone if it has no labels."""


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
    components: tuple[ComponentPlan, ...]
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
                ComponentPlan(
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

    def open(self, open_maps: OpenMaps = open_map_files) -> Stream:
        """Return the stream; ``open_maps`` finds the maps of the heads."""
        if self.blend is not None:
            self.blend.load_counts(self._counts_path(self.blend))
        orders = [component.open(open_maps) for component in self.components]
        return Stream(self.description, orders, self.blend)

    def _counts_path(self, blend: Blend) -> Path:
        return Path(f"{self.components[0].dataset.prefix}_blend_{blend.name}.counts")
