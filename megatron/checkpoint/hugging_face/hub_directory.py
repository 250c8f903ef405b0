"""Files of a directory laid out as on the Hugging Face hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.base.errors import CheckpointError
from megatron.base.printing import printable
from megatron.base.regular_files import open_regular, read_small_text

__all__ = ["has_file", "hub_file", "read_json"]

_JSON_LIMIT_BYTES = 1 << 28
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
