"""The datasets of a run, where they lie now: opened order by order, checked by content."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.ledger.ledger_file import DatasetNote
from megatron.stream.identity import DatasetIdentity, identify
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.opening import open_order_alone
from megatron.stream.order_description import OrderDescription
from megatron.stream.sample_stream import Stream
from megatron.stream.stream_settings import DatasetFiles

__all__ = ["RunData"]


class RunData:
    """Streams of the orders of a run; each is opened when first asked for.

    A dataset is looked for where it was seen last, and among ``prefixes``; it is taken only if its
    content is what the run read.

    Args:
        datasets: by identity, where they were seen last.
        prefixes: where datasets lie now, in any order.
        full: look at every byte of a large dataset before it is taken.
    """

    def __init__(
        self,
        datasets: Mapping[str, DatasetNote],
        prefixes: Sequence[str] = (),
        *,
        full: bool = False,
    ) -> None:
        self._datasets = datasets
        self._full = full
        self._prefixes = prefixes
        self._located: dict[str, DatasetFiles] = {}
        self._streams: dict[str, Stream] = {}

    def stream(self, order: OrderDescription) -> Stream:
        """Return the samples of an order.

        Raises:
            DatasetError: a dataset isn't there, or isn't what the run read.
        """
        stream = self._streams.get(order.order_id)
        if stream is None:
            stream = open_order_alone(order, self.files)
            self._streams[order.order_id] = stream
        return stream

    def read(
        self, order: OrderDescription, order_positions: NDArray[np.int64]
    ) -> tuple[NDArray[Any], list[NDArray[Any]]]:
        """Return the tokens at places in an order, and what samples have beside them.

        Raises:
            DatasetError: see :meth:`stream`.
        """
        stream = self.stream(order)
        companions = [stream.read_labels(order_positions)] if stream.has_labels else []
        return stream.read(order_positions), companions

    def dataset(self, identity: str) -> IndexedDataset:
        """Open a dataset.

        Raises:
            DatasetError: it isn't there, or isn't what the run read.
        """
        return IndexedDataset(self.files(identity).prefix)

    def files(self, identity: str) -> DatasetFiles:
        """Return where a dataset lies.

        Raises:
            DatasetError: it isn't there, or isn't what the run read.
        """
        located = self._located.get(identity)
        if located is None:
            located = self._locate(identity)
            self._located[identity] = located
        return located

    def _locate(self, identity: str) -> DatasetFiles:
        note = self._datasets.get(identity)
        label = None if note is None else note.companions.get("label")
        for files in self._candidates(label):
            if self._identity(files).digest == identity:
                return files
        if note is None:
            raise DatasetError(
                f"the ledger does not say where the dataset with content {identity} lies; name its "
                "prefix with --data"
            )
        size = f"{note.num_documents} documents, {note.num_tokens} tokens"
        for path in (note.path, *([] if label is None else [label])):
            if not _has_index(path):
                whose = f"dataset {path} ({size})" if path == note.path else f"label dataset {path}"
                raise DatasetError(
                    f"{whose} is not there; if it lies elsewhere now, name its prefix with --data"
                )
        files = DatasetFiles(note.path, label)
        found = self._identity(files)
        if found.digest != identity and found.level == "index" and not note.index:
            raise DatasetError(
                f"{note.path}: token files are missing, and the run's record is too old to tell "
                f"by the others whether it is what the run read ({size})"
            )
        if found.digest != identity:
            labels = "" if label is None else f" with labels {label}"
            raise DatasetError(
                f"{note.path}{labels} is not what the run read: its content was {identity} "
                f"({size}) and is now "
                f"{found.digest} ({found.num_documents} documents, {found.num_tokens} tokens); "
                "if the original lies elsewhere, name its prefix with --data"
            )
        return files

    def _candidates(self, label: str | None) -> Iterator[DatasetFiles]:
        """Yield what the named prefixes may be: datasets, or with labels also the labels."""
        if label is None:
            yield from map(DatasetFiles, self._prefixes)
            return
        labels = [*([label] if _has_index(label) else []), *self._prefixes]
        note_paths = [note.path for note in self._datasets.values() if _has_index(note.path)]
        for prefix in dict.fromkeys([*self._prefixes, *note_paths]):
            yield from (DatasetFiles(prefix, one) for one in labels if one != prefix)

    def _identity(self, files: DatasetFiles) -> DatasetIdentity:
        found = identify(files.prefix, files.companions, full=self._full)
        return found.named_by(self._datasets)


def _has_index(prefix: str) -> bool:
    """Whether a dataset is there; of its token files only those that are read must be."""
    return Path(prefix + ".idx").exists()
