"""Files of a directory laid out as on the Hugging Face hub."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.base.errors import CheckpointError
from megatron.base.printing import printable
from megatron.base.regular_files import open_regular, read_small_text

__all__ = ["has_file", "hub_file", "published_sha256", "read_json", "without_links"]

_JSON_LIMIT_BYTES = 1 << 28
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RECORD_LIMIT_BYTES = 1 << 16
_POINTER = b"version https://git-lfs"


def has_file(directory: Path, name: str) -> bool:
    """Whether ``directory`` has an entry called ``name``, a dangling link included."""
    return (directory / name).is_symlink() or (directory / name).exists()


def hub_file(directory: Path, name: str) -> Path:
    """Return the path of a file's bytes.

    In the hub's cache the names are links into ``blobs`` beside ``snapshots``; these are followed,
    others are refused.

    Raises:
        CheckpointError: it isn't there, leads elsewhere, or stands for a file not yet downloaded.
    """
    path = directory / name
    if "/" in name or name in ("", ".", ".."):
        raise CheckpointError(f"{directory}: {printable(name)!r} is no file's name")
    if path.is_symlink():
        target = path.resolve()
        snapshot = directory.resolve()
        homes = (snapshot, snapshot.parents[1] / "blobs" if len(snapshot.parents) > 1 else snapshot)
        if not any(target.is_relative_to(home) for home in homes):
            raise CheckpointError(
                f"{path} is a link to {target}, outside of its directory; copy it: cp -rL"
            )
        if not target.exists():
            raise CheckpointError(f"{path} is a link to {target}, which is missing")
        path = target
    with open_regular(path) as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{directory / name} is git-lfs's pointer to a file, not the file: git lfs pull"
            )
    return path


def published_sha256(directory: Path, name: str) -> str | None:
    """Return the SHA-256 that the hub gave for a file when it was downloaded.

    huggingface_hub calls the cached blobs of large files by it, and keeps it under
    ``.cache/huggingface`` where files were downloaded to a directory of their own.

    Returns:
        None if there is no such record: the file is small, or came some other way.
    """
    path = directory / name
    if path.is_symlink() and _SHA256.fullmatch(blob := path.resolve().name):
        return blob
    record = directory / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    if not record.is_file():
        return None
    lines = read_small_text(record, limit_bytes=_RECORD_LIMIT_BYTES).split()
    return next((word for word in lines if _SHA256.fullmatch(word)), None)


def without_links(directory: Path) -> Path:
    """Return a directory that has ``directory``'s files instead of links to them.

    NeoX's files are read through no links. Those of a snapshot in the hub's cache are linked
    together, which takes no room, in ``linked`` beside ``snapshots``; any other directory is
    returned as it is.

    Raises:
        CheckpointError: a link leads elsewhere, or the cache can't be written to.
    """
    links = [path for path in directory.iterdir() if path.is_symlink()]
    snapshot = directory.resolve()
    if not links or len(snapshot.parents) < 2 or snapshot.parent.name != "snapshots":
        return directory
    linked = snapshot.parents[1] / "linked" / snapshot.name
    try:
        linked.mkdir(parents=True, exist_ok=True)
        for path in links:
            file, place = hub_file(directory, path.name), linked / path.name
            if place.exists() and not place.samefile(file):
                place.unlink()
            if not place.exists():
                os.link(file, place)
    except OSError as error:
        raise CheckpointError(
            f"{linked} could not be written: {error}; download to a directory of its own: "
            "hf download --local-dir"
        ) from error
    return linked


def read_json(directory: Path, name: str) -> Mapping[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    path = hub_file(directory, name)
    try:
        content = json.loads(read_small_text(path, limit_bytes=_JSON_LIMIT_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory / name} is no JSON: {printable(str(error))}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{directory / name} holds no JSON object")
    return content
