"""NeoX's names for datasets on disk; the work is done by `megatron.stream.indexed_dataset`."""

import os
from pathlib import Path

import numpy as np

from megatron.base.errors import DatasetError
from megatron.stream.index_file import read_index
from megatron.stream.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, dataset_exists

__all__ = [
    "MMapIndexedDataset",
    "MMapIndexedDatasetBuilder",
    "best_fitting_dtype",
    "data_file_path",
    "dataset_exists",
    "index_file_path",
    "infer_dataset_impl",
    "make_builder",
    "make_dataset",
]

MMapIndexedDatasetBuilder = IndexedDatasetBuilder


class MMapIndexedDataset(IndexedDataset):
    """A dataset under NeoX's constructor, which reads it through once unless told not to."""

    def __init__(self, path: str | os.PathLike[str], skip_warmup: bool = False) -> None:
        super().__init__(path, warm_up=not skip_warmup)


def best_fitting_dtype(vocab_size: int | None = None) -> type[np.uint16] | type[np.int32]:
    """Return the storage type for a vocabulary; unknown sizes get the wide one."""
    return np.uint16 if vocab_size is not None and vocab_size < 65500 else np.int32


def data_file_path(prefix_path: str) -> str:
    """Return where the tokens of a dataset in one piece are."""
    return prefix_path + ".bin"


def index_file_path(prefix_path: str) -> str:
    """Return where a dataset's index is."""
    return prefix_path + ".idx"


def infer_dataset_impl(path: str) -> str | None:
    """Return the ``data_impl`` that reads ``path``; None if it is no dataset.

    Raises:
        DatasetError: it is there but damaged, or in the legacy format.
    """
    if not dataset_exists(path):
        return None
    read_index(Path(index_file_path(path)))
    return "mmap"


def make_builder(
    out_file: str | os.PathLike[str], impl: str, vocab_size: int | None = None
) -> IndexedDatasetBuilder:
    """Begin a dataset whose token file is ``out_file``.

    Raises:
        DatasetError: ``impl`` is a format that cannot be written.
    """
    _require_mmap(impl)
    return IndexedDatasetBuilder(out_file, best_fitting_dtype(vocab_size))


def make_dataset(path: str, impl: str, skip_warmup: bool = False) -> MMapIndexedDataset:
    """Open a dataset; a missing one is an error, not None as in NeoX.

    Raises:
        DatasetError: it is missing, damaged, or of a format that cannot be read.
    """
    _require_mmap("mmap" if impl == "infer" else impl)
    return MMapIndexedDataset(path, skip_warmup)


def _require_mmap(impl: str) -> None:
    if impl != "mmap":
        raise DatasetError(f"dataset implementation {impl!r} is not supported; use 'mmap'")
