"""What a dataset is, whatever its files are called and however they are cut: a digest of content.

    text   = "neox-ledger dataset 1", dtype, documents, token bytes, digest of the sizes,
             level, digest of the token bytes; one a line
    digest = first 32 hexadecimal digits of SHA-256(text)

Up to 4 GiB all token bytes are hashed (level ``complete``), above that 4096 blocks of 64 KiB spread
evenly from the first byte to the last (``sampled``). Blocks count in the dataset's own bytes, so
that shards may be cut anywhere. ``doc_idx`` is no part of it: nothing in training reads it.

Where shards are missing the digest is that of the index (level ``index``, and no digest of the
token bytes). Datasets of equal document sizes can have the same one: all preshuffled sets of one
length do. So what could be hashed is kept as well, in up to 512 *pieces* of consecutive blocks, and
a run recognises its data by its index and the pieces that both it and the files know (``Record``,
decision 0007).

Hashing is done once: the result is kept beside the data with size, time and inode of every file.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, Self

import numpy as np

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import DatasetError
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.token_bytes import TokenBytes

__all__ = ["DatasetIdentity", "Level", "Record", "file_status", "identify"]

Level = Literal["complete", "sampled", "index"]

_ALGORITHM = "neox-ledger dataset 1"
_WHOLE_BYTES = 4 << 30  # more are sampled
_BLOCK_BYTES = 16 << 20
_SAMPLED_BLOCKS = 4096
_SAMPLED_BLOCK_BYTES = 64 << 10
_THREADS = 8  # hashing releases the interpreter lock; on network file systems they hide latency
_CACHE_VERSION = 2
_PIECES = 512  # at most
_PIECE_DIGITS = 8
_UNKNOWN_PIECE = "-" * _PIECE_DIGITS


class Record(Protocol):
    """What a run has on record of a dataset besides its name."""

    @property
    def index(self) -> str:
        """Digest of its index; empty if an earlier release didn't write it down."""

    @property
    def pieces(self) -> str:
        """Short digests of pieces of its bytes, dashes for those that nobody has seen."""


@dataclass(frozen=True)
class DatasetIdentity:
    """A dataset's content, with that of its companions (labels, rewards, reference values)."""

    digest: str  # names the content in orders, the same at either level of care
    level: Level  # what was looked at: every token byte, samples of them, or not all samples
    num_documents: int
    num_tokens: int
    index_digest: str  # of dtype and document sizes alone
    pieces: str  # short digests of what was looked at, see above
    complete_digest: str | None = None
    """Digest of every byte; equal to ``digest`` unless the dataset is large. None if sampled."""

    def named_by(self, records: Mapping[str, Record]) -> Self:
        """Return it under the name that a run knows it by, if the run does.

        A dataset keeps its name while shards of it are missing, and when they come back: the index
        is the same, and every piece that the run and these files know is.

        Args:
            records: what the run has read, by name.

        Raises:
            DatasetError: shards are missing, and it could be several of them.
        """
        if self.digest in records and self.level != "index":
            return self
        names = [
            name
            for name, record in records.items()
            if record.index == self.index_digest and _agree(record.pieces, self.pieces)
        ]
        if len(names) > 1:
            raise DatasetError(
                f"the run has read several datasets whose documents have the sizes of this one "
                f"({self.num_documents} documents, {self.num_tokens} tokens; {', '.join(names)}), "
                "and too many shards are missing to tell which it is"
            )
        if names:
            pieces = _merged(records[names[0]].pieces, self.pieces)
            return dataclasses.replace(self, digest=names[0], pieces=pieces)
        if self.digest in records:  # the same index, but other bytes
            return dataclasses.replace(self, digest=_joined(self.digest, [("bytes", self.pieces)]))
        return self


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
    everything = (identity, *(one for _, one in others))
    index_digest = _joined(
        identity.index_digest, [(role, one.index_digest) for role, one in others]
    )
    pieces = "".join(one.pieces for one in everything)
    if any(one.level == "index" for one in everything):
        return dataclasses.replace(
            identity,
            digest=index_digest,
            level="index",
            index_digest=index_digest,
            pieces=pieces,
            complete_digest=None,
        )
    all_complete = all(one.complete_digest for one in everything)
    return dataclasses.replace(
        identity,
        digest=_joined(identity.digest, [(role, one.digest) for role, one in others]),
        level="complete" if all_complete else "sampled",
        index_digest=index_digest,
        pieces=pieces,
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


def _agree(one: str, other: str) -> bool:
    """Whether all pieces are equal that are known on both sides."""
    if "" not in (one, other) and len(one) != len(other):
        return False
    return all(
        _UNKNOWN_PIECE in (mine, theirs) or mine == theirs
        for mine, theirs in zip(_split(one), _split(other), strict=False)
    )


def _merged(one: str, other: str) -> str:
    """Return what is known on either side of pieces that agree."""
    if not one:
        return other
    pairs = zip(_split(one), _split(other), strict=True)
    return "".join(theirs if mine == _UNKNOWN_PIECE else mine for mine, theirs in pairs)


def _split(pieces: str) -> list[str]:
    return [pieces[at : at + _PIECE_DIGITS] for at in range(0, len(pieces), _PIECE_DIGITS)]


def _identify_one(prefix: str, *, full: bool, on_bytes: Callable[[int], None]) -> DatasetIdentity:
    dataset = IndexedDataset(prefix)
    files = _statuses(dataset)
    known = _read_cache(prefix, files)
    if known is not None and (known.level != "sampled" or not full):
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

    def named(level: Level, content: str) -> str:
        lines = (_ALGORITHM, dataset.dtype.name, len(dataset), tokens.size, sizes, level, content)
        return _short_digest("\n".join(map(str, lines)))

    is_small = tokens.size <= _WHOLE_BYTES
    usual = _all_blocks(tokens.size) if is_small else _spread_blocks(tokens.size)
    digests = _block_digests(tokens, usual, on_bytes)
    index_digest = named("index", "")
    level: Level = "complete" if is_small else "sampled"
    digest, complete = index_digest, None
    if tokens.missing:
        level = "index"
    else:
        digest = named(level, _digest_of_blocks(digests))
        if is_small:
            complete = digest
        elif full:
            blocks = _block_digests(tokens, _all_blocks(tokens.size), on_bytes)
            level, complete = "complete", named("complete", _digest_of_blocks(blocks))
    return DatasetIdentity(
        digest=digest,
        level=level,
        num_documents=len(dataset),
        num_tokens=tokens.size // dataset.dtype.itemsize,
        index_digest=index_digest,
        pieces=_pieces(digests),
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


def _block_digests(
    tokens: TokenBytes, blocks: Iterable[tuple[int, int]], on_bytes: Callable[[int], None]
) -> list[bytes | None]:
    """Return the digest of each block; None where a shard is missing."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(_THREADS) as threads:
        files = [
            stack.enter_context(open(shard.path, "rb")) if shard.is_there else None
            for shard in tokens.shards
        ]

        def block_digest(block: tuple[int, int]) -> bytes | None:
            digest = hashlib.sha256()
            for index, start, stop in tokens.parts(*block):
                file = files[index]
                if file is None:
                    return None
                digest.update(_read(file, start, stop))
            on_bytes(block[1] - block[0])
            return digest.digest()

        return list(threads.map(block_digest, blocks))


def _digest_of_blocks(digests: Iterable[bytes | None]) -> str:
    whole = hashlib.sha256()
    for digest in digests:
        assert digest is not None  # noqa: S101 - the caller knows that no shard is missing
        whole.update(digest)
    return whole.hexdigest()


def _pieces(digests: Sequence[bytes | None]) -> str:
    """Return a short digest of so many consecutive blocks each; unknown if one of them is."""
    length = max(1, -(-len(digests) // _PIECES))  # blocks
    pieces = []
    for first in range(0, len(digests), length):
        blocks = digests[first : first + length]
        pieces.append(
            _UNKNOWN_PIECE if None in blocks else _digest_of_blocks(blocks)[:_PIECE_DIGITS]
        )
    return "".join(pieces)


def _read(file: BinaryIO, start: int, stop: int) -> bytes:
    # Not through a memory map: pages read once cost more to map than to copy.
    content = os.pread(file.fileno(), stop - start, start)
    if len(content) < stop - start:
        raise DatasetError(f"{file.name} ended at {start + len(content)} while it was read")
    return content


def _statuses(dataset: IndexedDataset) -> list[dict[str, int] | None]:
    return [
        file_status(dataset.index.path),
        *(file_status(shard.path) if shard.is_there else None for shard in dataset.tokens.shards),
    ]


def _cache_path(prefix: str) -> Path:
    return Path(f"{prefix}_identity.json")


def _read_cache(prefix: str, files: list[dict[str, int] | None]) -> DatasetIdentity | None:
    try:
        content: dict[str, Any] = json.loads(_cache_path(prefix).read_bytes())
        if content.pop("version") != _CACHE_VERSION or content.pop("files") != files:
            return None
        return DatasetIdentity(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
