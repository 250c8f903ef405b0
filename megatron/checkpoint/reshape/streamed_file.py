"""Torch files whose tensors are produced while they are written, one piece after the other.

torch.save wants every tensor of a file in memory. A data-parallel rank's part of the optimizer
state is as large as the model divided by few, so here the file is written from its beginning to
its end, and a tensor exists only while its bytes pass. What comes out is the zip that torch.save
writes: torch.load reads and maps it.
"""

import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.base.errors import CheckpointError
from megatron.base.file_digests import FileDigest
from megatron.ledger.manifest import StoredFile

__all__ = ["StreamedTensor", "write_streamed_file"]

_ALIGNMENT = 64  # of every tensor in the file, so that mapped ones can be computed with
_PIECE_BYTES = 1 << 21
_STORAGES = {
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.uint8: "ByteStorage",
}
_LOCAL_HEADER_BYTES = 30
_ZIP64_EXTRA_BYTES = 20
_PADDING_ID = 0x4246  # "FB", as torch.save marks it


@dataclass(frozen=True)
class StreamedTensor:
    """Stands for a tensor in the content of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[torch.Tensor]]
    """Gives its elements in order, in tensors of any shape; called once, when it is written."""

    requires_grad: bool = False

    @property
    def num_elements(self) -> int:
        """Elements in all pieces together."""
        return math.prod(self.shape)

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], torch.Tensor]) -> Any:
        """Return the tensor that ``read`` gives in one piece."""
        return cls(tuple(shape), dtype, lambda: [read()])


def write_streamed_file(content: Any, path: Path) -> StoredFile:
    """Write ``content``, which may hold streamed tensors, to a new file, and sync it.

    Raises:
        CheckpointError: the disk refused; says what the system said.
    """
    try:
        with open(path, "xb") as file:
            stream = _HashedStream(file)
            _write_archive(content, stream)
            file.flush()
            os.fsync(file.fileno())
            # Written pages count as this process's use of memory in a container.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
    return StoredFile(stream.digest.size, stream.digest.hexdigest())


def _write_archive(content: Any, stream: "_HashedStream") -> None:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=2)
    pickler.dump(content)
    # The stream cannot be sought in, so zipfile puts checksums behind the data.
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        _write_record(archive, stream, "data.pkl", [memoryview(buffer.getvalue())])
        small = {
            ".format_version": b"1",
            ".storage_alignment": str(_ALIGNMENT).encode(),
            "byteorder": b"little",
        }
        for name, data in small.items():
            _write_record(archive, stream, name, [memoryview(data)])
        for number, tensor in enumerate(pickler.tensors):
            _write_record(archive, stream, f"data/{number}", _bytes_of(tensor))
        _write_record(archive, stream, "version", [memoryview(b"3\n")])


def _write_record(
    archive: zipfile.ZipFile, stream: "_HashedStream", name: str, data: Iterable[memoryview]
) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")
    start = stream.tell() + _LOCAL_HEADER_BYTES + len(info.filename) + _ZIP64_EXTRA_BYTES
    padding = -(start + 4) % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as record:
        for piece in data:
            record.write(piece)


def _bytes_of(tensor: StreamedTensor) -> Iterable[memoryview]:
    written = 0
    for piece in tensor.pieces():
        if piece.dtype != tensor.dtype:
            raise TypeError(f"a piece of a {tensor.dtype} tensor is {piece.dtype}")
        written += piece.numel()
        data = memoryview(piece.detach().contiguous().view(-1).view(torch.uint8).numpy())
        for start in range(0, len(data), _PIECE_BYTES):
            yield data[start : start + _PIECE_BYTES]
    if written != tensor.num_elements:
        raise ValueError(f"a tensor of shape {tensor.shape} was given {written} elements")


@dataclass(frozen=True)
class _Storage:
    """Stands for the memory of a tensor while its place in the file is pickled."""

    number: int
    dtype: torch.dtype
    num_elements: int


class _Pickler(pickle.Pickler):
    """Pickles tensors as torch.save does, and lists them in the order of their numbers."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[StreamedTensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = getattr(torch, _STORAGES[obj.dtype])
        return "storage", kind, str(obj.number), "cpu", obj.num_elements

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            whole = obj
            obj = StreamedTensor.of(whole.shape, whole.dtype, lambda: whole)
        if not isinstance(obj, StreamedTensor):
            return NotImplemented
        storage = _Storage(len(self.tensors), obj.dtype, obj.num_elements)
        self.tensors.append(obj)
        stride = tuple(math.prod(obj.shape[place + 1 :]) for place in range(len(obj.shape)))
        return torch._utils._rebuild_tensor_v2, (
            storage,
            0,
            torch.Size(obj.shape),
            stride,
            obj.requires_grad,
            OrderedDict(),
        )


class _HashedStream:
    """A file that is written from beginning to end, and its digest."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.digest = FileDigest()

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.digest.update(view)
        self._file.write(view)
        return view.nbytes

    def tell(self) -> int:
        return self.digest.size

    def flush(self) -> None:
        self._file.flush()

    def seekable(self) -> bool:
        return False
