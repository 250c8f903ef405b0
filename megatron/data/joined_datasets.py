"""Several datasets as one: the tokens one after another, and the index of all of them."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.data.dataset_output import appearing_together
from megatron.stream.index_file import write_index
from megatron.stream.indexed_dataset import IndexedDataset

__all__ = ["find_datasets", "join_datasets"]

_COPY_BYTES = 16 << 20


def find_datasets(folder: Path) -> list[IndexedDataset]:
    """Open all datasets of ``folder``, sorted by name.

    Raises:
        DatasetError: there are none, one is damaged, or a ``.bin`` has no ``.idx``.
    """
    datasets = [IndexedDataset(path.with_suffix("")) for path in sorted(folder.glob("*.idx"))]
    if not datasets:
        raise DatasetError(f"no dataset in {folder}: no file there ends in .idx")
    known = {shard.path for dataset in datasets for shard in dataset.tokens.shards}
    alone = sorted(path.name for path in folder.glob("*.bin") if path not in known)
    if alone:
        raise DatasetError(f"{folder}: without an .idx of the same name: {', '.join(alone)}")
    return datasets


def join_datasets(datasets: Sequence[IndexedDataset], prefix: Path) -> int:
    """Write ``datasets``, in this order, as one dataset; return its number of documents.

    Raises:
        DatasetError: files are missing, they store tokens in different types, or ``prefix`` is one
            of them.
    """
    first = datasets[0]
    for dataset in datasets:
        dataset.tokens.require_all()
        if dataset.dtype != first.dtype:
            raise DatasetError(
                f"{first.prefix} holds {first.dtype} and {dataset.prefix} {dataset.dtype}: they "
                "cannot be joined; tokenize them with the same tokenizer"
            )
        if os.path.realpath(dataset.prefix) == os.path.realpath(prefix):
            raise DatasetError(f"the output {prefix} would replace one of the datasets to join")
    with appearing_together([prefix]) as (output,):
        with open(output.bin_path, "wb") as tokens:
            for shard in (shard for dataset in datasets for shard in dataset.tokens.shards):
                with open(shard.path, "rb") as source:
                    shutil.copyfileobj(source, tokens, _COPY_BYTES)
            tokens.flush()
            os.fsync(tokens.fileno())
        sizes = np.concatenate([dataset.sizes for dataset in datasets])
        write_index(output.idx_path, first.dtype, sizes, _joined_doc_idx(datasets))
    return len(sizes)


def _joined_doc_idx(datasets: Sequence[IndexedDataset]) -> NDArray[np.int64]:
    parts = [np.zeros(1, dtype=np.int64)]
    num_documents = 0
    for dataset in datasets:
        doc_idx = dataset.doc_idx
        if doc_idx[-1] != len(dataset):  # lost in an earlier merge by NeoX
            doc_idx = np.arange(len(dataset) + 1)
        parts.append(doc_idx[1:] + num_documents)
        num_documents += len(dataset)
    return np.concatenate(parts)
