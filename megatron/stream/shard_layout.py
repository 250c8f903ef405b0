"""Which files hold the token bytes of a dataset, and which of its bytes each one has.

A dataset ``P`` is one file ``P.bin``, or shards ``P-00000-of-00132.bin`` and so on to
``P-00132-of-00132.bin``: the last number is the last index, as Pythia's files have it. A cut may
fall anywhere, also inside a token.

Shards that aren't there are no problem until their bytes are asked for, as long as the others tell
where they begin: all shards but the last have one size, and the ``.idx`` knows the sum. Names of
files that should be there say how many there are.
"""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.base.errors import DatasetError
from megatron.stream.index_file import IndexFile

__all__ = ["Shard", "assumed_shards", "find_shards", "lay_out"]

_SHARD_SUFFIX = re.compile(r"-(\d{5})-of-(\d{5})\.bin$")


@dataclass(frozen=True)
class Shard:
    """One physical file and the half-open byte range of the dataset that it holds."""

    path: Path
    start: int
    stop: int
    is_there: bool = True  # when the dataset was opened


def find_shards(prefix: str) -> list[Path]:
    """Return the token files of ``prefix`` in order, with the names of those that are missing.

    Empty if none of them is there.

    Raises:
        DatasetError: shards of two different cuts lie side by side.
    """
    whole = Path(prefix + ".bin")
    if whole.exists():
        return [whole]
    found: dict[int, dict[int, Path]] = {}
    for name in glob.glob(glob.escape(prefix) + "-*-of-*.bin"):
        match = _SHARD_SUFFIX.search(name)
        if match is not None and name[: match.start()] == prefix:
            found.setdefault(int(match[2]), {})[int(match[1])] = Path(name)
    if not found:
        return []
    if len(found) > 1:
        lasts = " and ".join(f"-of-{last:05d}" for last in sorted(found))
        raise DatasetError(f"{prefix}: shards of different cuts ({lasts}); keep one set")
    last, shards = next(iter(found.items()))
    beyond = max(shards)
    if beyond > last:
        raise DatasetError(f"{shards[beyond]}: its number is beyond the last one, {last:05d}")
    return [shards.get(index, _shard_path(prefix, index, last)) for index in range(last + 1)]


def lay_out(prefix: str, index: IndexFile) -> tuple[Shard, ...]:
    """Return the token files of a dataset, with the bytes that each one has.

    Without any token file that is ``P.bin``, which isn't there.

    Raises:
        DatasetError: sizes contradict the index or each other.
    """
    size_bytes = index.size_bytes
    paths = find_shards(prefix) or [Path(prefix + ".bin")]
    sizes = [_size(path) for path in paths]
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        if sum(known) != size_bytes:
            relation = "shorter" if sum(known) < size_bytes else "longer"
            name = str(paths[0]) if len(paths) == 1 else f"the shards of {prefix}"
            raise DatasetError(
                f"{name}: {sum(known)} bytes, {relation} than the {size_bytes} that {index.path} "
                f"says ({len(index.sizes)} documents of {index.dtype}); the two are not from one "
                "run, or a copy was cut off"
            )
        inferred = known
    else:
        inferred = _inferred_sizes(prefix, paths, sizes, size_bytes)
    return _consecutive(paths, inferred, [size is not None for size in sizes])


def assumed_shards(prefix: str, size_bytes: int, shard_bytes: int) -> tuple[Shard, ...]:
    """Return the files that ``size_bytes`` would be cut into; none of them is there.

    As Pythia's files: a last one, possibly empty, follows the full ones.
    """
    last = size_bytes // shard_bytes
    paths = [_shard_path(prefix, index, last) for index in range(last + 1)]
    sizes = [shard_bytes] * last + [size_bytes - last * shard_bytes]
    return _consecutive(paths, sizes, [False] * len(paths))


def _inferred_sizes(
    prefix: str, paths: Sequence[Path], sizes: Sequence[int | None], total: int
) -> list[int]:
    """Return all sizes: those of shards that aren't there follow from one that is."""
    num_full = len(paths) - 1  # all but the last have one size
    if num_full == 0:
        return [total]
    there = [index for index, size in enumerate(sizes) if size is not None]
    first = there[0]
    last_size = sizes[-1]
    full_size = sizes[first]
    if first == num_full:  # only the last one is there
        rest = total - (last_size or 0)
        if rest < 0 or rest % num_full:
            raise DatasetError(
                f"{paths[-1]}: {last_size} bytes, which leaves {rest} of {total} for the "
                f"{num_full} shards before it: not equal parts; it was cut off, or is of another "
                "dataset"
            )
        full_size = rest // num_full
    assert full_size is not None  # noqa: S101 - ``first`` is there
    for index in there:
        if index < num_full and sizes[index] != full_size:
            raise DatasetError(
                f"{prefix}: {len(paths) - len(there)} of {len(paths)} shards are missing, and "
                f"where they begin can't be told: {paths[first].name} has {full_size} bytes and "
                f"{paths[index].name} has {sizes[index]}. One was cut off, or all shards are needed"
            )
    expected = total - num_full * full_size
    if not 0 <= expected <= full_size or last_size not in (None, expected):
        problem = (
            f"leave {expected} for the last one"
            if last_size is None
            else f"leave {expected} for {paths[-1].name}, which has {last_size}"
        )
        raise DatasetError(
            f"{prefix}: {num_full} shards of {full_size} bytes ({paths[first].name}) of {total} in "
            f"all {problem}; a file was cut off, or is of another dataset"
        )
    return [full_size] * num_full + [expected]


def _consecutive(
    paths: Sequence[Path], sizes: Sequence[int], are_there: Sequence[bool]
) -> tuple[Shard, ...]:
    shards = []
    start = 0
    for path, size, is_there in zip(paths, sizes, are_there, strict=True):
        shards.append(Shard(path, start, start + size, is_there))
        start += size
    return tuple(shards)


def _shard_path(prefix: str, index: int, last: int) -> Path:
    return Path(f"{prefix}-{index:05d}-of-{last:05d}.bin")


def _size(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None
