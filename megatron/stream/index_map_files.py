"""Index maps kept in NeoX's cache files beside the dataset, and never used when stale.

NeoX takes any files of the right name. Here a sidecar says which dataset, documents and map files
belong together; maps without one that fits (NeoX's own, v1.0's, or stale ones) are checked against
the dataset once and rebuilt if they don't fit. Names carry how many samples a run asked for, which
the maps themselves don't depend on beyond their epochs; so equal maps of another name are found by
their sidecars, and used or linked instead of computed again.
"""

import contextlib
import fcntl
import glob
import itertools
import json
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import DatasetError
from megatron.stream.identity import file_status
from megatron.stream.map_recipes import MapRecipe

__all__ = [
    "MapRequest",
    "build_map_files",
    "foreign_stems",
    "neox_stems",
    "open_map_files",
    "open_or_build_maps",
]

logger = logging.getLogger(__name__)

_SIDECAR_VERSION = 2
_SIDECAR_SUFFIX = "_checked.json"
_Maps = TypeVar("_Maps")


@dataclass(frozen=True)
class MapRequest(Generic[_Maps]):
    """Which maps are wanted, and the files that hold them."""

    sources: tuple[Path, ...]  # files that the maps are made from; the .idx first
    recipe: MapRecipe[_Maps]
    stem: str  # path without _doc_idx.npy and so on
    other_stems: tuple[str, ...] = ()  # tried when ``stem`` has no files
    identity: str | None = None  # of the dataset's content, if it is known
    foreign: tuple[str, ...] = ()  # may be these maps, or others; nothing is said if they aren't
    similar: str | None = None  # equal maps whose path begins so are used too
    is_name_kept: bool = True
    """Whether files of the name ``stem`` must exist afterwards; equal ones are linked to it. Then
    only maps built here count as equal: whether others' are shuffled as NeoX does isn't checked."""

    def paths(self, stem: str) -> dict[str, Path]:
        """Return the files of the arrays."""
        return {name: Path(f"{stem}_{name}.npy") for name in self.recipe.names}

    def named_stems(self) -> Iterator[str]:
        """Yield the stems of the wanted names whose files are all there."""
        for stem in (self.stem, *self.other_stems):
            if all(path.exists() for path in self.paths(stem).values()):
                yield stem

    def equal_stems(self) -> Iterator[str]:
        """Yield the stems of maps under other names that sidecars say to be the same."""
        if self.similar is None:
            return
        origins = ("built",) if self.is_name_kept else ("built", "checked")
        for sidecar in sorted(glob.glob(f"{glob.escape(self.similar)}*{_SIDECAR_SUFFIX}")):
            stem = sidecar.removesuffix(_SIDECAR_SUFFIX)
            if stem in (self.stem, *self.other_stems):
                continue
            if _read_json(Path(sidecar)).get("origin") in origins and _sidecar_fits(self, stem):
                yield stem

    def foreign_stems(self) -> Iterator[str]:
        """Yield those of ``foreign`` that have the types and lengths of the maps."""
        for stem in self.foreign:
            if _load(self, stem)[0] is not None:
                yield stem


def neox_stems(
    prefix: str,
    name: str,
    *,
    num_samples: int | None,
    seq_length: int,
    seed: int,
    allow_chopped: bool,
    packing: str = "packed",
) -> tuple[str, str]:
    """Return the stems under which NeoX's main and v1.0 keep index maps.

    Args:
        prefix: of the dataset.
        name: ``train``, or ``train_0`` for the first of several datasets, and so on.
        num_samples: samples asked of this dataset; NeoX writes None for one epoch.
        seq_length: tokens a sample consumes.
        seed: the configuration's.
        allow_chopped: of the configuration; for packed samples only a part of main's name.
        packing: NeoX's pack_impl; v1.0 knows packed samples only.
    """
    v1_stem = f"{prefix}_{name}_indexmap_{num_samples}ns_{seq_length}sl_{seed}s"
    return f"{v1_stem}_{packing}pi" + ("_ac" if allow_chopped else ""), v1_stem


def foreign_stems(
    prefix: str, *, seq_length: int, seed: int, packing: str, allow_chopped: bool
) -> tuple[str, ...]:
    """Return the stems beside a dataset that NeoX may have given to maps of any length of run."""
    if packing == "packed":
        endings = ["", "_packedpi", "_packedpi_ac"]
    else:
        endings = [f"_{packing}pi" + ("_ac" if allow_chopped else "")]
    found = [
        path.removesuffix("_doc_idx.npy")
        for ending in endings
        for path in glob.glob(
            f"{glob.escape(prefix)}_*_indexmap_*ns_{seq_length}sl_{seed}s{ending}_doc_idx.npy"
        )
    ]
    return tuple(sorted(found))


def build_map_files(request: MapRequest[Any]) -> None:
    """Make sure that files fit for ``request`` exist: check those that are there, or write them.

    Raises:
        DatasetError: they cannot be written.
    """
    for stem in request.named_stems():
        problem = _checked(request, stem)
        if problem is None:
            return
        logger.warning(
            "index maps %s_*.npy do not fit the dataset and are not used: %s", stem, problem
        )
    for stem in request.equal_stems():
        if not request.is_name_kept or _link(request, stem):
            return
    if any(_checked(request, stem) is None for stem in request.foreign_stems()):
        return
    try:
        request.recipe.write(request.paths(request.stem))
    except OSError as error:
        raise DatasetError(
            f"cannot write the index maps {request.stem}_*.npy: {error}; make the folder "
            "writable, or link the dataset's .bin and .idx into one that is"
        ) from error
    _write_sidecar(request, request.stem, "built")


def open_map_files(request: MapRequest[_Maps]) -> _Maps:
    """Map the files that :func:`build_map_files` left, in this or another process.

    Raises:
        DatasetError: there are none that fit.
    """
    stems = (request.named_stems(), request.equal_stems(), request.foreign_stems())
    for stem in itertools.chain.from_iterable(stems):
        arrays, problem = _load(request, stem)
        if arrays is not None and _sidecar_fits(request, stem):
            return request.recipe.assemble(arrays)
        if arrays is not None and request.recipe.problem_of_content(arrays) is None:
            _write_sidecar(request, stem, "checked")
            return request.recipe.assemble(arrays)
        logger.debug("index maps %s: %s", stem, problem)
    raise DatasetError(
        f"the index maps {request.stem}_*.npy are missing or do not fit {request.sources[0]}: "
        "the process that builds them failed, or works on a file system of its own (then set "
        "use_shared_fs: false), or another job replaced them (same dataset, other split); start "
        "again"
    )


def open_or_build_maps(request: MapRequest[_Maps]) -> _Maps:
    """Open the files for ``request``; whoever comes first, at any time, builds them.

    Where nothing can be written the maps are computed in memory.
    """
    try:
        return open_map_files(request)
    except DatasetError:
        pass  # nothing fits yet
    try:
        with _locked(Path(f"{request.stem}.lock")):
            build_map_files(request)
        return open_map_files(request)
    except (OSError, DatasetError) as error:
        logger.warning("%s; they are computed in the memory of every reading process", error)
        return request.recipe.build()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, so it can't be left behind
        yield


def _load(
    request: MapRequest[Any], stem: str
) -> tuple[dict[str, NDArray[Any]], None] | tuple[None, str]:
    """Map the files; or say why they cannot be the maps."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, path in request.paths(stem).items():
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:  # what np.load raises for a damaged file
            return None, f"{path.name} cannot be read ({error})"
        # A plain array on the same pages: the memmap class makes every small look-up slower.
        arrays[name] = mapped.view(np.ndarray)
    problem = request.recipe.problem_of_form(arrays)
    return (arrays, None) if problem is None else (None, problem)


def _checked(request: MapRequest[Any], stem: str) -> str | None:
    """Return what is wrong with existing maps; those of unknown origin are looked through once."""
    if _sidecar_fits(request, stem):
        return None
    arrays, problem = _load(request, stem)
    if arrays is not None:
        problem = request.recipe.problem_of_content(arrays)
    if problem is None:
        _write_sidecar(request, stem, "checked")
    return problem


def _link(request: MapRequest[Any], equal_stem: str) -> bool:
    """Give equal maps the wanted name too; False where the file system can't."""
    targets = request.paths(request.stem)
    try:
        for name, path in request.paths(equal_stem).items():
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
            os.link(path, temporary)
            os.replace(temporary, targets[name])
    except OSError:
        return False
    _write_sidecar(request, request.stem, "built")
    return True


def _sidecar_path(stem: str) -> Path:
    return Path(f"{stem}{_SIDECAR_SUFFIX}")


def _sidecar(request: MapRequest[Any], stem: str) -> dict[str, Any]:
    return {
        "version": _SIDECAR_VERSION,
        "dataset": request.identity,
        "maps_of": request.recipe.facts,
        "sources": [file_status(path) for path in request.sources],
        "maps": {name: file_status(path) for name, path in request.paths(stem).items()},
    }


def _sidecar_fits(request: MapRequest[Any], stem: str) -> bool:
    recorded = _read_json(_sidecar_path(stem))
    if recorded.get("maps_of") != request.recipe.facts:
        return False
    try:
        wanted = _sidecar(request, stem)
    except FileNotFoundError:
        return False
    if any(recorded.get(key) != wanted[key] for key in ("version", "maps")):
        return False
    if None in (recorded.get("dataset"), request.identity):
        return bool(recorded.get("sources") == wanted["sources"])
    return bool(recorded["dataset"] == request.identity)


def _write_sidecar(request: MapRequest[Any], stem: str, origin: str) -> None:
    # Without it (a read-only folder) the maps are checked again at the next start.
    with contextlib.suppress(OSError):
        content = {**_sidecar(request, stem), "origin": origin}
        write_atomically(_sidecar_path(stem), json.dumps(content, indent=1) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; empty if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
