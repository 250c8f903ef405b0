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

    digest: str  # of its values as fp32: equal for fp16 and an fp32 file that was widened from it
    shape: tuple[int, ...]
    dtype: torch.dtype  # as stored
    mean: float
    std: float
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


def measure(tensor: torch.Tensor) -> Measured:
    """Read a tensor once, a few megabytes at a time."""
    digest = FileDigest()
    total = squares = 0.0
    nonfinite = 0
    exact = set(_TYPES)
    low, high = math.inf, -math.inf
    first = math.nan
    for piece in row_pieces(tensor):
        values = piece.detach().float().contiguous()
        digest.update(memoryview(values.view(-1).view(torch.uint8).numpy()))
        if math.isnan(first):
            first = float(values.view(-1)[0])
        wide = values.double()
        total += float(wide.sum())
        squares += float((wide * wide).sum())
        smallest, largest = torch.aminmax(values)
        low, high = min(low, float(smallest)), max(high, float(largest))
        if not math.isfinite(float(smallest)) or not math.isfinite(float(largest)):
            nonfinite += int((~torch.isfinite(values)).sum())
        for name in tuple(exact):
            if piece.dtype != _TYPES[name] and not torch.equal(
                values.to(_TYPES[name]).float(), values
            ):
                exact.discard(name)
    count = max(1, tensor.numel())
    mean = total / count
    return Measured(
        digest=digest.hexdigest(),
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        mean=mean,
        std=math.sqrt(max(0.0, squares / count - mean * mean)),
        num_nonfinite=nonfinite,
        is_constant=low == high,
        first=first,
        exact_in=frozenset(exact),
    )
