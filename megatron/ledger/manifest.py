"""``global_stepN/manifest.json``: what a complete checkpoint consists of.

It is the last file written into a checkpoint: with it the checkpoint is complete, and size and
digest of every other file are known. NeoX's checkpoints have none.
"""

import heapq
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import CheckpointError
from megatron.base.file_digests import FileDigest, digest_file
from megatron.base.regular_files import read_small_text

__all__ = [
    "MANIFEST_FILE",
    "Manifest",
    "StoredFile",
    "digest_problems",
    "manifest_text",
    "quick_problems",
    "read_manifest",
    "share_by_size",
    "share_of_files",
    "write_manifest",
]

MANIFEST_FILE = "manifest.json"
FORMAT = 1
"""Raised when a reader of the old format would misunderstand the new one."""

_LIMIT_BYTES = 1 << 28  # a million files, and more
_PLACE = ("sequence", "step", "run_id", "attempt", "parent")
_TENSOR_SUFFIXES = (".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class StoredFile:
    """One file of a checkpoint."""

    size: int  # bytes
    digest: str  # megatron.base.file_digests


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint's place among those of its ``save``, and its files."""

    sequence: int  # commits into this `save`, from 1
    step: int
    run_id: str | None  # None, like attempt: saved by something that keeps no ledger
    attempt: int | None
    parent: int | None  # sequence of the lineage's previous checkpoint here; None: it has none
    files: Mapping[str, StoredFile]  # by path below the checkpoint, with "/"


def read_manifest(checkpoint: Path) -> Manifest | None:
    """Return the manifest in a ``global_stepN`` directory.

    Returns:
        None if there is none: NeoX wrote the checkpoint, or a release that kept no manifest.

    Raises:
        CheckpointError: it was damaged, edited, written by a newer release, or names a file
            outside of the checkpoint.
    """
    path = checkpoint / MANIFEST_FILE
    if not os.path.lexists(path):
        return None
    text = read_small_text(path, limit_bytes=_LIMIT_BYTES)
    try:
        return _from_json(json.loads(text))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a manifest ({type(error).__name__}: {error}); it was damaged or edited"
        ) from error


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into a checkpoint's directory, durably.

    Raises:
        CheckpointError: it names a file outside of the checkpoint.
        OSError: it cannot be written.
    """
    write_atomically(checkpoint / MANIFEST_FILE, manifest_text(manifest))


def manifest_text(manifest: Manifest) -> str:
    """Return the content of ``manifest.json``.

    Raises:
        CheckpointError: it names a file outside of the checkpoint.
    """
    for name in manifest.files:
        _require_inside(name)
    values = {
        "format": FORMAT,
        **{name: getattr(manifest, name) for name in _PLACE},
        "files": {name: asdict(file) for name, file in sorted(manifest.files.items())},
    }
    return json.dumps({**values, "checksum": _checksum(values)}, indent=1) + "\n"


def quick_problems(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Return what is wrong with a checkpoint as far as names and sizes tell; no file is opened.

    Files that the manifest doesn't name are somebody's notes or a tool's output, unless they hold
    tensors: DeepSpeed finds its files by their names, and would read them.
    """
    problems = []
    step = checkpoint.name.removeprefix("global_step")
    if checkpoint.name.startswith("global_step") and step != str(manifest.step):
        problems.append(f"its manifest is that of step {manifest.step}")
    for name, file in sorted(manifest.files.items()):
        problem = _quick_problem(checkpoint, name, file)
        if problem is not None:
            problems.append(f"{name} {problem}")
    problems.extend(
        f"{name} does not belong to it" for name in _tensor_files(checkpoint, manifest.files)
    )
    return problems


def digest_problems(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Return which of the files called ``names`` don't hold what was written; they are read."""
    problems = []
    for name in names:
        file = manifest.files[name]
        problem = _quick_problem(checkpoint, name, file)
        if problem is None:
            try:
                found = digest_file(checkpoint / name)
            except OSError as error:
                problem = f"cannot be read: {error.strerror}"
            else:
                if found != file.digest:
                    problem = (
                        f"holds other bytes than were written (digest {found}, its manifest says "
                        f"{file.digest})"
                    )
        if problem is not None:
            problems.append(f"{name} {problem}")
    return problems


def share_of_files(manifest: Manifest, rank: int, world_size: int) -> list[str]:
    """Return the files that ``rank`` of ``world_size`` checks; each file is one rank's."""
    sizes = {name: file.size for name, file in manifest.files.items()}
    return share_by_size(sizes, rank, world_size)


def share_by_size(sizes: Mapping[str, int], rank: int, world_size: int) -> list[str]:
    """Return the names that are dealt to ``rank``.

    The largest are dealt out first, each to who has the fewest bytes.
    """
    loads = [(0, one) for one in range(world_size)]
    share = []
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        load, owner = heapq.heappop(loads)
        heapq.heappush(loads, (load + size + 1, owner))  # opening a file costs too
        if owner == rank:
            share.append(name)
    return sorted(share)


def _quick_problem(checkpoint: Path, name: str, file: StoredFile) -> str | None:
    path = checkpoint
    try:
        for part in PurePosixPath(name).parts:
            path = path / part
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                return "is, or lies behind, a symbolic link; its bytes must lie in the checkpoint"
        size = path.lstat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    if not stat.S_ISREG(mode):
        return "is not a regular file"
    if size != file.size:
        return f"has {size} bytes instead of {file.size}"
    return None


def _tensor_files(checkpoint: Path, known: Mapping[str, StoredFile]) -> list[str]:
    found = []
    for folder, folders, files in os.walk(checkpoint):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            name = (Path(folder) / file).relative_to(checkpoint).as_posix()
            if file.endswith(_TENSOR_SUFFIXES) and not file.startswith(".") and name not in known:
                found.append(name)
    return sorted(found)


def _from_json(values: Mapping[str, Any]) -> Manifest:
    if values["format"] != FORMAT:
        raise CheckpointError(
            f"manifest format {values['format']} is not known; this release reads format {FORMAT}"
        )
    rest = dict(values)
    if rest.pop("checksum") != _checksum(rest):
        raise CheckpointError("its checksum doesn't fit its content; it was damaged or edited")
    for name in values["files"]:
        _require_inside(name)
    return Manifest(
        **{name: values[name] for name in _PLACE},
        files={name: StoredFile(**file) for name, file in values["files"].items()},
    )


def _checksum(values: Mapping[str, Any]) -> str:
    digest = FileDigest()
    digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()


def _require_inside(name: str) -> None:
    parts = name.split("/")
    if "\0" in name or name == MANIFEST_FILE or any(part in ("", ".", "..") for part in parts):
        raise CheckpointError(f"{name!r} is not the name of a file inside of the checkpoint")
