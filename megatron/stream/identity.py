"""What a dataset is, whatever its files are called and however they are cut: a digest of content.

    text   = "neox-ledger dataset 1", dtype, documents, token bytes, digest of the sizes,
             level, digest of the token bytes; one a line
    digest = first 32 hexadecimal digits of SHA-256(text)

Up to 4 GiB all token bytes are hashed (level ``complete``), above that 4096 blocks of 64 KiB spread
evenly from the first byte to the last (``sampled``). Blocks count in the dataset's own bytes, so
that shards may be cut anywhere. ``doc_idx`` is no part of it: nothing in training reads it.

Hashing is done once: the result is kept beside the data with size, time and inode of every file.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import DatasetError
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.token_bytes import TokenBytes

__all__ = ["DatasetIdentity", "Level", "file_status", "identify"]

Level = Literal["complete", "sampled"]

_ALGORITHM = "neox-ledger dataset 1"
_WHOLE_BYTES = 4 << 30  # more are sampled
_BLOCK_BYTES = 16 << 20
_SAMPLED_BLOCKS = 4096
_SAMPLED_BLOCK_BYTES = 64 << 10
_THREADS = 8  # hashing releases the interpreter lock; on network file systems they hide latency
_CACHE_VERSION = 1


@dataclass(frozen=True)
class DatasetIdentity:
    """A dataset's content, with that of its companions (labels, rewards, reference values)."""

    digest: str  # names the content in orders, the same at either level of care
    level: Level  # "complete": every token byte was looked at
    num_documents: int
    num_tokens: int
    complete_digest: str | None = None
    """Digest of every byte; equal to ``digest`` unless the dataset is large. None if sampled."""


def identify(
    prefix: str,
    companions: Sequence[tuple[str, str]] = (),
    *,
    full: bool = False,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> DatasetIdentity:
    """Return the identity of a dataset; it is hashed only if that was not done before.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        companions: (role, prefix) of what samples are read from too: ``label``, ``reward`` and
            ``ref``, in that order.
        full: look at every byte, however large the dataset.
        on_bytes: told how many bytes were hashed, from any thread.

    Raises:
        DatasetError: files are missing or damaged, or change while they are read.
    """
    identity = _identify_one(prefix, full=full, on_bytes=on_bytes)
    if not companions:
        return identity
    others = [
        (role, _identify_one(path, full=full, on_bytes=on_bytes)) for role, path in companions
    ]
    all_complete = all(one.complete_digest for one in (identity, *(one for _, one in others)))
    return dataclasses.replace(
        identity,
        digest=_joined(identity.digest, [(role, one.digest) for role, one in others]),
        level="complete" if all_complete else "sampled",
        complete_digest=_joined(
            str(identity.complete_digest),
            [(role, str(one.complete_digest)) for role, one in others],
        )
        if all_complete
        else None,
    )


def file_status(path: Path) -> dict[str, int]:
    """Return what changes when a file does: its size, time of change and inode."""
    status = os.stat(path)
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _joined(digest: str, companions: Iterable[tuple[str, str]]) -> str:
    lines = [_ALGORITHM, digest, *(f"{role} {other}" for role, other in companions)]
    return _short_digest("\n".join(lines))


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _identify_one(prefix: str, *, full: bool, on_bytes: Callable[[int], None]) -> DatasetIdentity:
    dataset = IndexedDataset(prefix)
    files = _statuses(dataset)
    known = _read_cache(prefix, files)
    if known is not None and (known.level == "complete" or not full):
        return known
    identity = _hash(dataset, full=full, on_bytes=on_bytes)
    if _statuses(dataset) != files:
        raise DatasetError(
            f"{prefix}: its files changed while they were read; wait until whatever writes them "
            "is done"
        )
    # A folder that can't be written costs the time again at the next start.
    with contextlib.suppress(OSError):
        content = {"version": _CACHE_VERSION, "files": files, **dataclasses.asdict(identity)}
        write_atomically(_cache_path(prefix), json.dumps(content, indent=1) + "\n")
    return identity


def _hash(
    dataset: IndexedDataset, *, full: bool, on_bytes: Callable[[int], None]
) -> DatasetIdentity:
    tokens = dataset.tokens
    sizes = hashlib.sha256(np.ascontiguousarray(dataset.sizes).data).hexdigest()

    def named(level: Level, blocks: Iterable[tuple[int, int]]) -> str:
        content = _digest_of_blocks(tokens, blocks, on_bytes)
        lines = (_ALGORITHM, dataset.dtype.name, len(dataset), tokens.size, sizes, level, content)
        return _short_digest("\n".join(map(str, lines)))

    is_small = tokens.size <= _WHOLE_BYTES
    complete = named("complete", _all_blocks(tokens.size)) if is_small or full else None
    digest = complete if is_small and complete else named("sampled", _spread_blocks(tokens.size))
    return DatasetIdentity(
        digest=digest,
        level="complete" if complete is not None else "sampled",
        num_documents=len(dataset),
        num_tokens=tokens.size // dataset.dtype.itemsize,
        complete_digest=complete,
    )


def _all_blocks(size: int) -> Iterable[tuple[int, int]]:
    for start in range(0, size, _BLOCK_BYTES):
        yield start, min(size, start + _BLOCK_BYTES)


def _spread_blocks(size: int) -> Iterable[tuple[int, int]]:
    last = size - _SAMPLED_BLOCK_BYTES
    for number in range(_SAMPLED_BLOCKS):
        start = number * last // (_SAMPLED_BLOCKS - 1)
        yield start, start + _SAMPLED_BLOCK_BYTES


def _digest_of_blocks(
    tokens: TokenBytes, blocks: Iterable[tuple[int, int]], on_bytes: Callable[[int], None]
) -> str:
    whole = hashlib.sha256()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(_THREADS) as threads:
        files = [stack.enter_context(open(shard.path, "rb")) for shard in tokens.shards]

        def block_digest(block: tuple[int, int]) -> bytes:
            digest = hashlib.sha256()
            for index, start, stop in tokens.parts(*block):
                digest.update(_read(files[index], start, stop))
            on_bytes(block[1] - block[0])
            return digest.digest()

        for digest in threads.map(block_digest, blocks):
            whole.update(digest)
    return whole.hexdigest()


def _read(file: BinaryIO, start: int, stop: int) -> bytes:
    # Not through a memory map: pages read once cost more to map than to copy.
    content = os.pread(file.fileno(), stop - start, start)
    if len(content) < stop - start:
        raise DatasetError(f"{file.name} ended at {start + len(content)} while it was read")
    return content


def _statuses(dataset: IndexedDataset) -> list[dict[str, int]]:
    paths = [dataset.index.path, *(shard.path for shard in dataset.tokens.shards)]
    return [file_status(path) for path in paths]


def _cache_path(prefix: str) -> Path:
    return Path(f"{prefix}_identity.json")


def _read_cache(prefix: str, files: list[dict[str, int]]) -> DatasetIdentity | None:
    try:
        content: dict[str, Any] = json.loads(_cache_path(prefix).read_bytes())
        if content.pop("version") != _CACHE_VERSION or content.pop("files") != files:
            return None
        return DatasetIdentity(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
