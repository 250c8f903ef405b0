"""The ``.idx`` file of a dataset: how many tokens each document has and where they begin.

Little-endian and without padding, so its arrays are not aligned:

    magic 9 | version u64 = 1 | dtype code u8 | L u64 | D u64 | sizes i32[L] | pointers i64[L]
    | doc_idx i64[D]

``pointers`` are byte offsets in the token file, the exclusive cumulative sum of the sizes.
``doc_idx`` is kept for compatibility; nothing in training reads it.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.stream.replaced_file import replaced_file

__all__ = ["DTYPE_CODES", "IndexFile", "dtype_code", "read_index", "write_index"]

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")

DTYPE_CODES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float32),
    7: np.dtype(np.float64),
    8: np.dtype(np.uint16),
}


@dataclass(frozen=True)
class IndexFile:
    """An opened ``.idx``; the arrays are views of the mapped file."""

    path: Path
    dtype: np.dtype[Any]
    sizes: NDArray[np.int32]  # tokens, shape (num_documents,)
    pointers: NDArray[np.int64]  # bytes, shape (num_documents,)
    doc_idx: NDArray[np.int64]

    @property
    def size_bytes(self) -> int:
        """Bytes the token file must have."""
        if not len(self.sizes):
            return 0
        return int(self.pointers[-1]) + int(self.sizes[-1]) * self.dtype.itemsize


def dtype_code(dtype: np.dtype[Any]) -> int:
    """Return the code that stands for ``dtype`` in an ``.idx``.

    Raises:
        ValueError: the format has no such type.
    """
    for code, known in DTYPE_CODES.items():
        if known == dtype:
            return code
    known_names = ", ".join(str(known) for known in DTYPE_CODES.values())
    raise ValueError(f"tokens cannot be stored as {dtype}; possible are {known_names}")


def read_index(path: Path) -> IndexFile:
    """Map an ``.idx`` and check its header against the file's size.

    Raises:
        DatasetError: it is not this format, another version, or truncated.
    """
    size_bytes = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
    if header.startswith(LEGACY_MAGIC):
        raise DatasetError(
            f"{path}: the legacy TNTIDX format (data_impl cached/lazy) cannot be read; "
            "tokenize again with tools/datasets/preprocess_data.py (--dataset-impl mmap)"
        )
    if not header.startswith(MAGIC[: len(header)]) or not header:
        raise DatasetError(
            f"{path}: not a dataset index: it begins with {header[:9]!r} instead of {MAGIC!r}"
        )
    if len(header) < _HEADER.size:
        raise DatasetError(
            f"{path}: truncated: {len(header)} bytes, the header alone has {_HEADER.size}; copy or "
            "build it again"
        )
    _, version, code, num_sizes, num_doc_idx = _HEADER.unpack(header)
    if version != VERSION:
        raise DatasetError(
            f"{path}: version {version} of the format; only {VERSION} is known: build it again "
            "with tools/datasets/preprocess_data.py"
        )
    if code not in DTYPE_CODES:
        raise DatasetError(
            f"{path}: dtype code {code} is unknown; known are {min(DTYPE_CODES)}"
            f"..{max(DTYPE_CODES)}; the file is damaged: copy or build it again"
        )
    expected = _HEADER.size + 12 * num_sizes + 8 * num_doc_idx
    if size_bytes != expected:
        problem = "truncated" if size_bytes < expected else "longer than its header says"
        raise DatasetError(
            f"{path}: {problem}: {size_bytes} bytes, but {num_sizes} sizes and pointers and "
            f"{num_doc_idx} document indices take {expected}; copy or build it again"
        )
    content = np.memmap(path, dtype=np.uint8, mode="r")
    pointers_at = _HEADER.size + 4 * num_sizes
    return IndexFile(
        path=path,
        dtype=DTYPE_CODES[code],
        sizes=np.frombuffer(content, np.int32, num_sizes, _HEADER.size),
        pointers=np.frombuffer(content, np.int64, num_sizes, pointers_at),
        doc_idx=np.frombuffer(content, np.int64, num_doc_idx, pointers_at + 8 * num_sizes),
    )


def write_index(
    path: Path, dtype: np.dtype[Any], sizes: NDArray[np.int32], doc_idx: Sequence[int]
) -> None:
    """Write an ``.idx`` under a temporary name and rename it to ``path``."""
    pointers = np.zeros(len(sizes), dtype=np.int64)
    np.cumsum(sizes[:-1], out=pointers[1:])
    pointers *= dtype.itemsize
    with replaced_file(path) as file:
        file.write(_HEADER.pack(MAGIC, VERSION, dtype_code(dtype), len(sizes), len(doc_idx)))
        file.write(np.ascontiguousarray(sizes, dtype=np.int32).data)
        file.write(pointers.data)
        file.write(np.asarray(doc_idx, dtype=np.int64).data)
