"""Index maps kept in NeoX's cache files beside the dataset, and never used when stale.

NeoX takes any files of the right name. Here a sidecar says which dataset files, documents and map
files belong together; maps without one that fits (NeoX's own, v1.0's, or stale ones) are checked
against the dataset once and rebuilt if they don't fit.
"""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import DatasetError
from megatron.stream import compiled
from megatron.stream.index_file import IndexFile
from megatron.stream.index_maps import (
    PackedMaps,
    PackedShape,
    build_packed_maps,
    sample_rows,
    shuffled_documents,
    shuffled_samples,
)
from megatron.stream.legacy_random import LegacyGenerator
from megatron.stream.replaced_file import replaced_file

__all__ = [
    "MapRequest",
    "build_map_files",
    "neox_stems",
    "open_map_files",
    "open_or_build_maps",
]

logger = logging.getLogger(__name__)

_MAPS = ("doc_idx", "sample_idx", "shuffle_idx")
_SIDECAR_VERSION = 1


@dataclass(frozen=True)
class MapRequest:
    """Which maps are wanted, and the files that hold them."""

    index: IndexFile
    shape: PackedShape
    seed: int
    stem: str  # path without _doc_idx.npy and so on
    other_stems: tuple[str, ...] = ()  # tried when ``stem`` has no files

    def paths(self, stem: str) -> dict[str, Path]:
        """Return the files of the three arrays."""
        return {name: Path(f"{stem}_{name}.npy") for name in _MAPS}


def neox_stems(
    prefix: str,
    name: str,
    *,
    num_samples: int | None,
    seq_length: int,
    seed: int,
    allow_chopped: bool,
) -> tuple[str, str]:
    """Return the stems under which NeoX's main and v1.0 keep the maps of packed samples.

    Args:
        prefix: of the dataset.
        name: ``train``, or ``train_0`` for the first of several datasets, and so on.
        num_samples: samples asked of this dataset; NeoX writes None for one epoch.
        seq_length: tokens a sample consumes.
        seed: the configuration's.
        allow_chopped: only a part of main's name; packed samples are always chopped.
    """
    v1_stem = f"{prefix}_{name}_indexmap_{num_samples}ns_{seq_length}sl_{seed}s"
    return f"{v1_stem}_packedpi" + ("_ac" if allow_chopped else ""), v1_stem


def build_map_files(request: MapRequest) -> None:
    """Make sure that files fit for ``request`` exist: check those that are there, or write them.

    Raises:
        DatasetError: they cannot be written.
    """
    for stem in (request.stem, *request.other_stems):
        if not all(path.exists() for path in request.paths(stem).values()):
            continue
        if _sidecar_fits(request, stem):
            return
        problem = _find_problem(request, stem)
        if problem is None:
            _write_sidecar(request, stem)
            return
        logger.warning(
            "index maps %s_*.npy do not fit the dataset and are not used: %s", stem, problem
        )
    try:
        _write_maps(request)
    except OSError as error:
        raise DatasetError(
            f"cannot write the index maps {request.stem}_*.npy: {error}; make the folder "
            "writable, or link the dataset's .bin and .idx into one that is"
        ) from error
    _write_sidecar(request, request.stem)


def open_map_files(request: MapRequest) -> PackedMaps:
    """Map the files that :func:`build_map_files` left, in this or another process.

    Raises:
        DatasetError: there are none that fit.
    """
    for stem in (request.stem, *request.other_stems):
        paths = request.paths(stem)
        if not all(path.exists() for path in paths.values()):
            continue
        maps, problem = _load(request.shape, paths)
        if maps is not None and (
            _sidecar_fits(request, stem) or _find_problem(request, stem) is None
        ):
            return maps
        logger.debug("index maps %s: %s", stem, problem)
    raise DatasetError(
        f"the index maps {request.stem}_*.npy are missing or do not fit {request.index.path}: "
        "the process that builds them failed, works on another file system "
        "(use_shared_fs: false), or another job replaced them (same dataset, other split); "
        "start again"
    )


def open_or_build_maps(request: MapRequest) -> PackedMaps:
    """Open the files for ``request``; whoever comes first, at any time, builds them.

    Where nothing can be written the maps are computed in memory.
    """
    try:
        with _locked(Path(f"{request.stem}.lock")):
            build_map_files(request)
        return open_map_files(request)
    except (OSError, DatasetError) as error:
        logger.warning("%s; they are computed in the memory of every reading process", error)
        return build_packed_maps(request.index.sizes, request.shape, request.seed)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, so it can't be left behind
        yield


def _write_maps(request: MapRequest) -> None:
    # Rows are written as they are computed, and the samples are shuffled meanwhile: at no time is
    # more in memory than doc_idx, shuffle_idx and one piece of sample_idx.
    shape, paths = request.shape, request.paths(request.stem)
    generator = LegacyGenerator(request.seed)
    doc_idx = shuffled_documents(shape, generator)
    with ThreadPoolExecutor(1) as thread:
        shuffle_idx = thread.submit(shuffled_samples, shape, generator)
        with replaced_file(paths["doc_idx"]) as file:
            np.save(file, doc_idx)
        with replaced_file(paths["sample_idx"]) as file:
            _write_rows(file, sample_rows(request.index.sizes, doc_idx, shape), shape)
        del doc_idx
        with replaced_file(paths["shuffle_idx"]) as file:
            np.save(file, shuffle_idx.result())


def _write_rows(file: BinaryIO, pieces: Iterator[NDArray[Any]], shape: PackedShape) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(shape.sample_idx_dtype),
        "fortran_order": False,
        "shape": (shape.num_samples + 1, 2),
    }
    np.lib.format.write_array_header_1_0(file, header)
    for rows in pieces:
        file.write(rows.data)


def _load(shape: PackedShape, paths: dict[str, Path]) -> tuple[PackedMaps, None] | tuple[None, str]:
    """Map the files; or say why they cannot be maps of ``shape``."""
    arrays = {}
    for name, path in paths.items():
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:  # what np.load raises for a damaged file
            return None, f"{path.name} cannot be read ({error})"
        # A plain array on the same pages: the memmap class makes every small look-up slower.
        arrays[name] = mapped.view(np.ndarray)
    integers = (np.dtype(np.int32), np.dtype(np.int64))
    expected = {
        "doc_idx": ((shape.num_epochs * len(shape.documents),), integers[:1]),
        "sample_idx": ((shape.num_samples + 1, 2), integers),
        "shuffle_idx": ((shape.num_samples,), (np.dtype(np.uint32), integers[1])),
    }
    for name, (size, dtypes) in expected.items():
        found = arrays[name]
        if found.shape != size or found.dtype not in dtypes:
            return None, f"{name} is {found.dtype}{found.shape}, expected {dtypes[0]}{size}"
    return PackedMaps(**arrays), None


def _find_problem(request: MapRequest, stem: str) -> str | None:
    """Check maps of unknown origin against the dataset; return what is wrong."""
    shape = request.shape
    maps, problem = _load(shape, request.paths(stem))
    if maps is None:
        return problem
    if not _occur(maps.doc_idx, shape.documents, shape.num_epochs):
        return (
            f"doc_idx is not {shape.num_epochs} times documents {shape.documents.start}"
            f"..{shape.documents.stop - 1} (another split or corpus)"
        )
    checked = 0
    for rows in sample_rows(request.index.sizes, maps.doc_idx, shape):
        if not np.array_equal(maps.sample_idx[checked : checked + len(rows)], rows):
            return "sample_idx is not what the document sizes give (the corpus has changed)"
        checked += len(rows)
    if not _occur(maps.shuffle_idx, range(shape.num_samples), 1):
        return "shuffle_idx is not a permutation of the samples"
    return None


def _occur(values: NDArray[Any], numbers: range, times: int) -> bool:
    """Whether ``values`` holds each of the consecutive ``numbers`` exactly ``times`` times."""
    # Counters stop at their maximum, so the small type can tell up to 254 from more.
    counters = np.zeros(len(numbers), dtype=np.uint8 if times < 255 else np.uint32)
    inside = compiled.count_occurrences(values, numbers.start, counters)
    return inside and bool((counters == times).all())


def _sidecar_path(stem: str) -> Path:
    return Path(f"{stem}_checked.json")


def _sidecar(request: MapRequest, stem: str) -> dict[str, Any]:
    documents = request.shape.documents
    return {
        "version": _SIDECAR_VERSION,
        "documents": [documents.start, documents.stop],
        "tokens_per_epoch": request.shape.tokens_per_epoch,
        "index_file": _file_identity(request.index.path),
        "maps": {name: _file_identity(path) for name, path in request.paths(stem).items()},
    }


def _file_identity(path: Path) -> dict[str, int]:
    status = os.stat(path)
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _sidecar_fits(request: MapRequest, stem: str) -> bool:
    try:
        recorded = json.loads(_sidecar_path(stem).read_bytes())
    except (OSError, ValueError):
        return False
    return bool(recorded == _sidecar(request, stem))


def _write_sidecar(request: MapRequest, stem: str) -> None:
    # Without it (a read-only folder) the maps are checked again at the next start.
    with contextlib.suppress(OSError):
        write_atomically(_sidecar_path(stem), json.dumps(_sidecar(request, stem), indent=1) + "\n")
