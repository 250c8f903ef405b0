"""How each kind of index maps is computed, written to files, and checked against the dataset."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron.stream import compiled
from megatron.stream.index_maps import (
    IndexMaps,
    PackedShape,
    build_packed_maps,
    sample_rows,
    shuffled_documents,
    shuffled_samples,
)
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.legacy_random import LegacyGenerator
from megatron.stream.replaced_file import replaced_file
from megatron.stream.row_maps import RowRule, build_block, build_head, keeps

__all__ = ["MapRecipe", "PackedRecipe", "RowRecipe", "SequentialRecipe"]

_Maps = TypeVar("_Maps", covariant=True)
Arrays = Mapping[str, NDArray[Any]]

_THREE = ("doc_idx", "sample_idx", "shuffle_idx")
_INTEGERS = (np.dtype(np.int32), np.dtype(np.int64))


class MapRecipe(Protocol[_Maps]):
    """What keeping maps in files needs to know of them."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays, in the order in which they are written."""

    @property
    def facts(self) -> dict[str, Any]:
        """What tells these maps from all others of the same dataset, as plain values."""

    def build(self) -> _Maps:
        """Compute the maps in memory."""

    def write(self, paths: Mapping[str, Path]) -> None:
        """Compute the maps into files, each appearing when it is whole."""

    def problem_of_form(self, arrays: Arrays) -> str | None:
        """Say why arrays of these types and lengths cannot be the maps."""

    def problem_of_content(self, arrays: Arrays) -> str | None:
        """Say why arrays of the right form are not maps of the dataset."""

    def assemble(self, arrays: Arrays) -> _Maps:
        """Return what :meth:`build` would, on the pages of files."""


@dataclass(frozen=True)
class PackedRecipe:
    """Packed samples of some epochs of consecutive documents."""

    sizes: NDArray[np.int32]
    shape: PackedShape
    seed: int  # of the generator

    @property
    def names(self) -> tuple[str, ...]:
        return _THREE

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "packing": "packed",
            "documents": _pair(self.shape.documents),
            "tokens_per_epoch": self.shape.tokens_per_epoch,
            "num_epochs": self.shape.num_epochs,
            "seq_length": self.shape.seq_length,
            "seed": self.seed,
        }

    def build(self) -> IndexMaps:
        return build_packed_maps(self.sizes, self.shape, self.seed)

    def write(self, paths: Mapping[str, Path]) -> None:
        # Rows are written as they are computed, and the samples are shuffled meanwhile: at no time
        # is more in memory than doc_idx, shuffle_idx and one piece of sample_idx.
        shape = self.shape
        generator = LegacyGenerator(self.seed)
        doc_idx = shuffled_documents(shape, generator)
        with ThreadPoolExecutor(1) as thread:
            shuffle_idx = thread.submit(shuffled_samples, shape, generator)
            with replaced_file(paths["doc_idx"]) as file:
                np.save(file, doc_idx)
            with replaced_file(paths["sample_idx"]) as file:
                _write_rows(file, sample_rows(self.sizes, doc_idx, shape), shape)
            del doc_idx
            with replaced_file(paths["shuffle_idx"]) as file:
                np.save(file, shuffle_idx.result())

    def problem_of_form(self, arrays: Arrays) -> str | None:
        shape = self.shape
        return _problem_of_form(
            arrays,
            {
                "doc_idx": ((shape.num_epochs * len(shape.documents),), _INTEGERS[:1]),
                "sample_idx": ((shape.num_samples + 1, 2), _INTEGERS),
                "shuffle_idx": ((shape.num_samples,), (np.dtype(np.uint32), _INTEGERS[1])),
            },
        )

    def problem_of_content(self, arrays: Arrays) -> str | None:
        shape, maps = self.shape, self.assemble(arrays)
        if not _occur(maps.doc_idx, shape.documents, shape.num_epochs):
            return (
                f"doc_idx is not {shape.num_epochs} times documents {shape.documents.start}"
                f"..{shape.documents.stop - 1} (another split or corpus)"
            )
        checked = 0
        for rows in sample_rows(self.sizes, maps.doc_idx, shape):
            if not np.array_equal(maps.sample_idx[checked : checked + len(rows)], rows):
                return "sample_idx is not what the document sizes give (the corpus has changed)"
            checked += len(rows)
        if not _occur(maps.shuffle_idx, range(shape.num_samples), 1):
            return "shuffle_idx is not a permutation of the samples"
        return None

    def assemble(self, arrays: Arrays) -> IndexMaps:
        return IndexMaps(**arrays)


@dataclass(frozen=True)
class RowRecipe:
    """Documents that are not cut (row_maps): NeoX's head, or one tail block."""

    dataset: IndexedDataset
    labels: IndexedDataset | None
    rule: RowRule
    num_rows: int | None  # of the head; None: a tail block
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        return _THREE

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "packing": self.rule.packing,
            "documents": _pair(self.rule.documents),
            "num_rows": self.num_rows,
            "seq_length": self.rule.seq_length,
            "allow_chopped": self.rule.allow_chopped,
            "labels": self.labels is not None,
            "seed": self.seed,
        }

    def build(self) -> IndexMaps:
        kept = keeps(self.rule, self.dataset, self.labels)
        if self.num_rows is None:
            return build_block(self.rule, self.dataset.sizes, kept, self.seed)
        return build_head(self.rule, self.dataset.sizes, kept, self.num_rows, self.seed)

    def write(self, paths: Mapping[str, Path]) -> None:
        maps = self.build()
        for name in self.names:
            with replaced_file(paths[name]) as file:
                np.save(file, getattr(maps, name))

    def problem_of_form(self, arrays: Arrays) -> str | None:
        num_rows = len(arrays["shuffle_idx"]) if self.num_rows is None else self.num_rows
        wide = _INTEGERS[1:]
        return _problem_of_form(
            arrays,
            {
                "doc_idx": (arrays["doc_idx"].shape[:1], wide),
                "sample_idx": ((num_rows + 1, 2), wide),
                "shuffle_idx": ((num_rows,), wide),
            },
        )

    def problem_of_content(self, arrays: Arrays) -> str | None:
        maps = self.build()
        for name in self.names:
            if not np.array_equal(arrays[name], getattr(maps, name)):
                return (
                    f"{name} is not what documents {self.rule.documents.start}.."
                    f"{self.rule.documents.stop - 1}, their sizes and labels give"
                )
        return None

    def assemble(self, arrays: Arrays) -> IndexMaps:
        return IndexMaps(**arrays)


@dataclass(frozen=True)
class SequentialRecipe:
    """A tail block of sequential data: its rows shuffled whole."""

    documents: range
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        return ("shuffle_idx",)

    @property
    def facts(self) -> dict[str, Any]:
        return {"packing": "sequential", "documents": _pair(self.documents), "seed": self.seed}

    def build(self) -> NDArray[Any]:
        num_rows = len(self.documents)
        shuffle_idx = np.arange(num_rows, dtype=np.uint32 if num_rows < 1 << 32 else np.int64)
        LegacyGenerator(self.seed).shuffle(shuffle_idx)
        return shuffle_idx

    def write(self, paths: Mapping[str, Path]) -> None:
        with replaced_file(paths["shuffle_idx"]) as file:
            np.save(file, self.build())

    def problem_of_form(self, arrays: Arrays) -> str | None:
        types = (np.dtype(np.uint32), _INTEGERS[1])
        return _problem_of_form(arrays, {"shuffle_idx": ((len(self.documents),), types)})

    def problem_of_content(self, arrays: Arrays) -> str | None:
        if not np.array_equal(arrays["shuffle_idx"], self.build()):
            return "shuffle_idx is not the shuffle of this block"
        return None

    def assemble(self, arrays: Arrays) -> NDArray[Any]:
        return arrays["shuffle_idx"]


def _pair(documents: range) -> list[int]:
    return [documents.start, documents.stop]


def _problem_of_form(
    arrays: Arrays, expected: Mapping[str, tuple[tuple[int, ...], tuple[np.dtype[Any], ...]]]
) -> str | None:
    for name, (shape, dtypes) in expected.items():
        found = arrays[name]
        if found.shape != shape or found.dtype not in dtypes:
            return f"{name} is {found.dtype}{found.shape}, expected {dtypes[0]}{shape}"
    return None


def _write_rows(file: BinaryIO, pieces: Iterator[NDArray[Any]], shape: PackedShape) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(shape.sample_idx_dtype),
        "fortran_order": False,
        "shape": (shape.num_samples + 1, 2),
    }
    np.lib.format.write_array_header_1_0(file, header)
    for rows in pieces:
        file.write(rows.data)


def _occur(values: NDArray[Any], numbers: range, times: int) -> bool:
    """Whether ``values`` holds each of the consecutive ``numbers`` exactly ``times`` times."""
    # Counters stop at their maximum, so the small type can tell up to 254 from more.
    counters = np.zeros(len(numbers), dtype=np.uint8 if times < 255 else np.uint32)
    inside = compiled.count_occurrences(values, numbers.start, counters)
    return inside and bool((counters == times).all())
