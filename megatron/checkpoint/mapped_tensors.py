"""Tensors of a torch file as NumPy arrays that are mappings of it, made without torch.

NumPy has no bfloat16: such tensors come as the 16-bit integers that hold them.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.base.torch_metadata import StoredTensor, inspect_torch_file

__all__ = ["MappedFile", "are_equal_rounded", "count_not_finite", "tensors_in"]

BF16 = "bfloat16"
_FLOATS = {"float16", "float32", "float64", BF16}
_NUMPY_TYPES = {BF16: np.dtype(np.uint16)}
_BF16_EXPONENT, _BF16_FRACTION = 0x7F80, 0x007F
_CHUNK = 1 << 22  # elements looked at at once: memory is bounded whatever the tensor's size


class MappedFile:
    """A torch file whose tensors are read when they are looked at.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = inspect_torch_file(path)
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")

    @property
    def content(self) -> Any:
        """The file's value; tensors are :class:`StoredTensor`."""
        return self._file.content

    def array(self, tensor: StoredTensor) -> NDArray[Any]:
        """Return the values of one of the file's tensors."""
        kind = _NUMPY_TYPES.get(tensor.dtype) or np.dtype(tensor.dtype)
        if not tensor.numel:
            return np.empty(tensor.shape, kind)
        start = self._file.starts[tensor.storage.key]
        whole = self._bytes[start : start + tensor.storage.size_bytes].view(kind)
        return np.lib.stride_tricks.as_strided(
            whole[tensor.offset :],  # that it holds all of the tensor was checked when it was read
            tensor.shape,
            [stride * kind.itemsize for stride in tensor.strides],
            writeable=False,
        )


def tensors_in(content: Any, path: str = "") -> Iterator[tuple[str, StoredTensor]]:
    """Yield every tensor in nested containers, with the keys that lead to it joined by dots."""
    if isinstance(content, StoredTensor):
        yield path, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from tensors_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from tensors_in(value, f"{path}.{index}" if path else str(index))


def count_not_finite(array: NDArray[Any], dtype: str) -> tuple[int, int]:
    """Return how many values are NaN, and how many infinite."""
    nans = infinities = 0
    for chunk in _chunks(array) if dtype in _FLOATS else ():
        if dtype == BF16:
            special = chunk[(chunk & _BF16_EXPONENT) == _BF16_EXPONENT]
            found = int(np.count_nonzero(special & _BF16_FRACTION))
            nans, infinities = nans + found, infinities + special.size - found
        elif not np.isfinite(chunk).all():
            nans += int(np.count_nonzero(np.isnan(chunk)))
            infinities += int(np.count_nonzero(np.isinf(chunk)))
    return nans, infinities


def are_equal_rounded(weights: NDArray[Any], dtype: str, copies: NDArray[np.float32]) -> bool:
    """Whether ``copies``, fp32, are ``weights`` once they are rounded to ``dtype``."""
    for weight, copy in zip(_chunks(weights), _chunks(copies), strict=True):
        if not np.array_equal(_rounded(copy, dtype), weight, equal_nan=dtype != BF16):
            return False
    return True


def _rounded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype != BF16:
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # to the nearest, of two equally near ones to the even one
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _chunks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    flat = array.reshape(-1)  # a copy only if the tensor is a view with gaps
    for start in range(0, math.prod(array.shape), _CHUNK):
        yield flat[start : start + _CHUNK]
