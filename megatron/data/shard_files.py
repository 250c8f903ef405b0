"""Cutting a dataset's token file into shards, joining them, and checking files against a list.

Training reads shards as they are (:mod:`megatron.stream.token_bytes`); joining is for other tools.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron.base.atomic_files import fsync_directory, write_atomically
from megatron.base.errors import DatasetError
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.shard_layout import find_shards

__all__ = ["check_files", "cut_dataset", "join_dataset", "read_checksums", "shard_name"]

_CHUNK_BYTES = 16 << 20
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")

Progress = Callable[[int, int], None]
"""Told of how many bytes of how many are done."""


def shard_name(prefix_name: str, index: int, num_shards: int) -> str:
    """Return the name of a shard; its last number is the last index, as in Pythia's files.

    Example:
        >>> shard_name("pile", 0, 133)
        'pile-00000-of-00132.bin'
    """
    return f"{prefix_name}-{index:05d}-of-{num_shards - 1:05d}.bin"


def cut_dataset(
    source: Path, target: Path, shard_bytes: int, on_progress: Progress = lambda *_: None
) -> dict[str, str]:
    """Write the token bytes of ``source`` as shards of ``target``, with the same ``.idx``.

    The source may be in shards itself. Files get their names when all of them are complete.

    Args:
        source: prefix of an existing dataset.
        target: prefix of the new one.
        shard_bytes: of every shard but the last. It need not be a multiple of the token size.
        on_progress: told of the bytes written.

    Returns:
        The SHA-256 of every written file by name.

    Raises:
        DatasetError: the source is damaged, or files of ``target`` exist.
    """
    if shard_bytes < 1:
        raise DatasetError(f"a shard of {shard_bytes} bytes is not possible; at least 1")
    dataset = IndexedDataset(source)
    dataset.tokens.require_all()
    total = dataset.tokens.size
    num_shards = max(1, -(-total // shard_bytes))
    if num_shards > 99_999:
        raise DatasetError(
            f"{total} bytes in shards of {shard_bytes} would be {num_shards} files, more than the "
            "99999 that their names can number; take larger shards"
        )
    names = [shard_name(target.name, index, num_shards) for index in range(num_shards)]
    return _write(dataset, target, dict.fromkeys(names, shard_bytes), on_progress)


def join_dataset(
    source: Path, target: Path, on_progress: Progress = lambda *_: None
) -> dict[str, str]:
    """Write the shards of ``source`` as ``target``'s one ``.bin``, with the same ``.idx``.

    Returns:
        The SHA-256 of every written file by name.

    Raises:
        DatasetError: shards are missing or damaged, or files of ``target`` exist.
    """
    dataset = IndexedDataset(source)
    dataset.tokens.require_all()
    names = {f"{target.name}.bin": max(1, dataset.tokens.size)}
    return _write(dataset, target, names, on_progress)


def read_checksums(path: Path) -> dict[str, str]:
    """Return SHA-256 by file name, of a list as sha256sum writes it or as Pythia published it.

    Lines are ``hash  name`` or ``name hash``.

    Raises:
        DatasetError: a line is neither, or the list is empty.
    """
    checksums = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        fields = line.split(maxsplit=1)
        if not fields:
            continue
        hashes = [field for field in fields if _SHA256.fullmatch(field.strip())]
        if len(fields) != 2 or len(hashes) != 1:
            raise DatasetError(f"{path}:{number}: not a file name with its SHA-256: {line[:80]!r}")
        name = fields[1] if fields[0] == hashes[0] else fields[0]
        checksums[name.strip().removeprefix("*").removeprefix("./")] = hashes[0].strip().lower()
    if not checksums:
        raise DatasetError(f"{path} lists no file")
    return checksums


def check_files(
    folder: Path, checksums: Mapping[str, str], on_progress: Progress = lambda *_: None
) -> tuple[list[str], list[str]]:
    """Compare files with their SHA-256.

    Returns:
        Names of files that aren't there, and of those whose content differs.
    """
    paths = {name: folder / name for name in checksums}
    missing = [name for name, path in paths.items() if not path.is_file()]
    sizes = {name: paths[name].stat().st_size for name in checksums if name not in missing}
    counter = _Counter(sum(sizes.values()), on_progress)
    different = []
    for name in sizes:
        digest = hashlib.sha256()
        with open(paths[name], "rb") as file:
            while block := file.read(_CHUNK_BYTES):
                digest.update(block)
                counter.add(len(block))
        if digest.hexdigest() != checksums[name]:
            different.append(name)
    return missing, different


class _Counter:
    def __init__(self, total: int, on_progress: Progress) -> None:
        self.done = 0
        self.total = total
        self._on_progress = on_progress

    def add(self, num_bytes: int) -> None:
        self.done += num_bytes
        self._on_progress(self.done, self.total)


def _write(
    dataset: IndexedDataset, target: Path, parts: Mapping[str, int], on_progress: Progress
) -> dict[str, str]:
    """Write the token bytes into files of at most so many bytes, then the index beside them."""
    existing = [str(path) for path in find_shards(str(target))]
    index_path = Path(f"{target}.idx")
    if index_path.exists():
        existing.append(str(index_path))
    if existing:
        raise DatasetError(f"{existing[0]} exists already; choose another output prefix")
    counter = _Counter(dataset.tokens.size, on_progress)
    checksums = {}
    with _unfinished(target.parent) as prepared:
        start = 0
        for name, num_bytes in parts.items():
            stop = min(start + num_bytes, dataset.tokens.size)
            with open(prepared(name), "wb") as file:
                checksums[name] = _copy(dataset, start, stop, file, counter)
            start = stop
        index = dataset.index.path.read_bytes()
        checksums[index_path.name] = hashlib.sha256(index).hexdigest()
        write_atomically(prepared(index_path.name), index)
    return checksums


def _copy(dataset: IndexedDataset, start: int, stop: int, file: BinaryIO, counter: _Counter) -> str:
    digest = hashlib.sha256()
    for first in range(start, stop, _CHUNK_BYTES):
        block = dataset.tokens.read(first, min(first + _CHUNK_BYTES, stop))
        digest.update(block.data)
        file.write(block.data)
        counter.add(len(block))
    file.flush()
    os.fsync(file.fileno())
    return digest.hexdigest()


@contextmanager
def _unfinished(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Yield where to write a file of a given name; all get their names at the end, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    prepared: dict[Path, Path] = {}

    def place(name: str) -> Path:
        return prepared.setdefault(folder / name, folder / f".{name}.unfinished")

    try:
        yield place
        for final, temporary in prepared.items():
            temporary.rename(final)
        fsync_directory(folder)
    finally:
        for temporary in prepared.values():
            temporary.unlink(missing_ok=True)
