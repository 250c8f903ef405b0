"""The safetensors format, read by mapping and written in one pass.

    8 bytes     length of the header, little-endian
    header      JSON: tensor name -> {dtype, shape, data_offsets}; padded with spaces
    data        the tensors, one after the other, without gaps

Files are written as the ``safetensors`` library writes them, byte for byte: names in order. The
library itself wants all tensors in memory.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.base.errors import CheckpointError
from megatron.base.printing import printable
from megatron.base.regular_files import open_regular
from megatron.checkpoint.reshape.streamed_file import StreamedTensor

__all__ = ["DTYPE_NAMES", "SafetensorsFile", "write_safetensors"]

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_HEADER_LIMIT_BYTES = 100_000_000  # the library's
_LENGTH_BYTES = 8
_METADATA = "__metadata__"


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in the data
    stop: int


class SafetensorsFile:
    """One file; its tensors are private mappings of it.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is not what it should be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                self._data_start, self._places = _read_header(file, size)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(
                    f"{path} ({size} bytes) is no whole safetensors file: {printable(str(error))}"
                ) from error
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    @property
    def names(self) -> list[str]:
        """The tensors' names."""
        return list(self._places)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, whose values are read when they are looked at."""
        place = self._places[name]
        count = math.prod(place.shape)
        if not count:
            return torch.empty(place.shape, dtype=place.dtype)
        start = self._data_start + place.start
        if start % place.dtype.itemsize:  # the format doesn't promise alignment
            data = bytearray(self._mapping[start : self._data_start + place.stop])
            return torch.frombuffer(data, dtype=place.dtype).view(place.shape)
        flat = torch.frombuffer(self._mapping, dtype=place.dtype, count=count, offset=start)
        return flat.view(place.shape)

    def release(self) -> None:
        """Let go of the memory of what was read; reading it again takes it from the file again."""
        self._mapping.madvise(mmap.MADV_DONTNEED)


def write_safetensors(path: Path, tensors: Mapping[str, StreamedTensor]) -> int:
    """Write a new file and sync it; return its size.

    Raises:
        CheckpointError: the disk refused; says what the system said.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.num_elements * tensor.dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    try:
        with open(path, "xb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, tensor in ordered:
                _write_tensor(file, name, tensor)
            file.flush()
            os.fsync(file.fileno())
            # Written pages count as this process's use of memory in a container.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
    return _LENGTH_BYTES + len(text) + end


def _write_tensor(file: Any, name: str, tensor: StreamedTensor) -> None:
    written = 0
    for piece in tensor.pieces():
        if piece.dtype != tensor.dtype:
            raise TypeError(f"a piece of {name}, {tensor.dtype}, is {piece.dtype}")
        written += piece.numel()
        file.write(memoryview(piece.detach().contiguous().view(-1).view(torch.uint8).numpy()))
    if written != tensor.num_elements:
        raise ValueError(f"{name}, of shape {tensor.shape}, was given {written} elements")


def _read_header(file: Any, size: int) -> tuple[int, dict[str, _Place]]:
    start = file.read(_LENGTH_BYTES)
    if len(start) < _LENGTH_BYTES:
        raise ValueError("it is too short to have a header")
    (length,) = struct.unpack("<Q", start)
    if length > min(_HEADER_LIMIT_BYTES, size - _LENGTH_BYTES):
        raise ValueError(f"its header would have {length} bytes")
    header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
    header.pop(_METADATA, None)
    data_start = _LENGTH_BYTES + length
    places = {name: _place(name, entry) for name, entry in header.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].stop)):
        if place.start != end:
            raise ValueError(f"{name} begins at byte {place.start} of the data, not at {end}")
        end = place.stop
    if data_start + end != size:
        raise ValueError(f"its header describes {data_start + end} bytes: it is cut or mixed up")
    return data_start, places


def _place(name: str, entry: Mapping[str, Any]) -> _Place:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} is of the unknown type {entry['dtype']}")
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
        raise ValueError(f"{name} has the shape {shape} at the bytes {start} to {stop}")
    dtype = _DTYPES[entry["dtype"]]
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}, {entry['dtype']} {list(shape)}, has {stop - start} bytes")
    return _Place(dtype, shape, start, stop)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return found
