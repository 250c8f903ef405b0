"""Datasets that appear under their names only when all of them are complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron.base.atomic_files import fsync_directory

__all__ = ["UnfinishedDataset", "appearing_together"]


@dataclass(frozen=True)
class UnfinishedDataset:
    """Where the two files of a dataset are written before it gets its name."""

    folder: Path

    @property
    def bin_path(self) -> Path:
        """File for the tokens."""
        return self.folder / "tokens.bin"

    @property
    def idx_path(self) -> Path:
        """File for the index."""
        return self.folder / "tokens.idx"


@contextmanager
def appearing_together(prefixes: Sequence[Path]) -> Iterator[list[UnfinishedDataset]]:
    """Give a place for each dataset's files; at the block's end they become ``prefixes``.

    If the block fails nothing appears, and datasets that were there stay. The places are hidden
    folders beside the prefixes, which is all that a kill may leave behind.
    """
    unfinished: list[UnfinishedDataset] = []
    try:
        for prefix in prefixes:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(dir=prefix.parent, prefix=f".{prefix.name}.")
            unfinished.append(UnfinishedDataset(Path(folder)))
        yield unfinished
        for prefix, dataset in zip(prefixes, unfinished, strict=True):
            _move_into_place(dataset, str(prefix))
    finally:
        for dataset in unfinished:
            shutil.rmtree(dataset.folder, ignore_errors=True)


def _move_into_place(dataset: UnfinishedDataset, prefix: str) -> None:
    # Without its .idx a dataset does not exist, so a kill in between leaves none, not a mixture
    # of an old and a new one.
    Path(prefix + ".idx").unlink(missing_ok=True)
    os.replace(dataset.bin_path, prefix + ".bin")
    os.replace(dataset.idx_path, prefix + ".idx")
    fsync_directory(dataset.folder.parent)
