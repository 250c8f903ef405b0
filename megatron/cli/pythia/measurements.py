"""What one reading of a tensor tells: a digest of its values, and their statistics."""

import math
from dataclasses import dataclass

import torch

from megatron.base.file_digests import FileDigest
from megatron.checkpoint.hugging_face.values import row_pieces

__all__ = ["Measured", "measure"]

_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Measured:
    """One tensor."""

    digest: str  # of its values: equal for an fp16 file and an fp32 one that was widened from it
    shape: tuple[int, ...]
    dtype: torch.dtype  # as stored
    mean: float | None  # None: wasn't asked for
    std: float | None
    num_nonfinite: int
    is_constant: bool
    first: float  # its first value; all of them if it is constant
    exact_in: frozenset[str]  # fp16, bf16: types that hold every value

    @property
    def num_elements(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it has two dimensions; every update changes such tensors somewhere."""
        return len(self.shape) > 1

    @property
    def is_unlearnt(self) -> bool:
        """Whether a bias or norm has its first values still, all 0 or all 1."""
        return not self.is_matrix and self.is_constant and self.first in (0.0, 1.0)


class _ValuesDigest:
    """Digest of values whatever type holds them: as fp16 if that is exact, else as fp32."""

    def __init__(self) -> None:
        self._half: FileDigest | None = FileDigest()
        self._single: FileDigest | None = None

    def update(self, piece: torch.Tensor, exact_in: set[str]) -> None:
        if self._half is not None and "fp16" not in exact_in:
            self._half = None
        if self._half is not None:
            self._half.update(_bytes(piece.half()))
        if piece.dtype != torch.float16:
            # all pieces are of one type, so none is missing here if fp16 turns out not to hold one
            self._single = self._single or FileDigest()
            self._single.update(_bytes(piece.float()))

    def hexdigest(self) -> str:
        if self._half is not None:
            return f"fp16:{self._half.hexdigest()}"
        assert self._single is not None  # noqa: S101 - an fp16 piece is exact in fp16
        return f"fp32:{self._single.hexdigest()}"


def measure(tensor: torch.Tensor, *, with_statistics: bool = False) -> Measured:
    """Read a tensor once, a few megabytes at a time.

    Args:
        tensor: it may be a mapping of its file.
        with_statistics: also mean and standard deviation, which take as long as the rest.
    """
    digest = _ValuesDigest()
    total = squares = 0.0
    nonfinite = 0
    exact = set(_TYPES)
    low, high, first = math.inf, -math.inf, math.nan
    for piece in row_pieces(tensor.detach()):
        if math.isnan(first):
            first = float(piece.reshape(-1)[0])
        smallest, largest = map(float, torch.aminmax(piece))
        low, high = min(low, smallest), max(high, largest)
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            nonfinite += int((~torch.isfinite(piece)).sum())
        for name in tuple(exact):
            if not _is_exact(piece, _TYPES[name]):
                exact.discard(name)
        digest.update(piece, exact)
        if with_statistics:
            values = piece.double()
            total += float(values.sum())
            squares += float(values.square_().sum())
    count = max(1, tensor.numel())
    mean = total / count
    return Measured(
        digest=digest.hexdigest(),
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        mean=mean if with_statistics else None,
        std=math.sqrt(max(0.0, squares / count - mean * mean)) if with_statistics else None,
        num_nonfinite=nonfinite,
        is_constant=low == high,
        first=first,
        exact_in=frozenset(exact),
    )


def _is_exact(piece: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` holds every value; NaN is held by all."""
    if piece.dtype == dtype:
        return True
    wide = piece.float()
    back = wide.to(dtype).float()
    return bool(torch.equal(back, wide)) or bool(((back == wide) | wide.isnan()).all())


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())
