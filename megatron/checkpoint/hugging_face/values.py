"""Looking at values, and converting them, while they pass from one file to another."""

from collections.abc import Iterator

import torch

from megatron.base.errors import CheckpointError

__all__ = ["DTYPES", "ValueWatch", "row_pieces"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE_BYTES = 1 << 22  # stays in the processor's cache while it is looked at
_BF16_UNUSED_BITS = 0xFFFF


def row_pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a tensor in order, a few megabytes of rows at a time."""
    if not tensor.numel():
        return
    row_bytes = tensor[0].numel() * tensor.element_size()
    rows = max(1, _PIECE_BYTES // row_bytes)
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows]


class ValueWatch:
    """Refuses values that aren't finite, and notes what the others would fit into.

    Args:
        dtype: values are converted to it; None: they keep their own.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self._exact_in = {torch.float16, torch.bfloat16}  # so far; of values that came as fp32
        self._num_fp32 = self._num_others = self._num_rounded = 0

    def dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        """Return the type that a tensor's values are written in."""
        return self._dtype or tensor.dtype

    def pass_on(
        self, piece: torch.Tensor, *, where: str, times: int = 1, divided_by: int = 1
    ) -> torch.Tensor:
        """Return ``piece`` times a fraction in the type that is written.

        Args:
            piece: values.
            where: file and tensor, for the message.
            times: the fraction's numerator.
            divided_by: its denominator.

        Raises:
            CheckpointError: a value is NaN or infinite, or becomes infinite.
        """
        _require_finite(piece, where)
        self._note(piece)
        dtype = self.dtype_of(piece)
        if times == divided_by:
            result = piece.to(dtype)
        else:
            exact = piece.double() * times / divided_by
            result = exact.to(dtype)
            self._num_rounded += int((result.double() != exact).sum())
        if result is not piece and not _are_finite(result):
            raise CheckpointError(
                f"{where} holds {float(piece.abs().max()):.6g}, which is beyond what "
                f"{_NAMES[result.dtype]} can hold; choose another type"
            )
        return result

    def notices(self) -> Iterator[str]:
        """Yield what a user should know of the values seen."""
        if self._num_fp32 and not self._num_others and self._dtype in (None, torch.float32):
            for dtype in sorted(self._exact_in, key=str, reverse=True):
                name = _NAMES[dtype]
                yield (
                    f"the weights are stored as fp32, but every one of them is exact in {name}: "
                    f"they were trained or published in {name} and widened; --dtype {name} halves "
                    "the files and loses nothing"
                )
        if self._num_rounded:
            yield (
                f"{self._num_rounded} biases were rounded when they were multiplied for another "
                "number of tensor ranks; --dtype fp32 keeps them nearer"
            )

    def _note(self, piece: torch.Tensor) -> None:
        if piece.dtype != torch.float32:
            self._num_others += piece.numel()
            return
        self._num_fp32 += piece.numel()
        if torch.float16 in self._exact_in and not torch.equal(piece.half().float(), piece):
            self._exact_in.discard(torch.float16)
        if torch.bfloat16 in self._exact_in:
            bits = piece.contiguous().view(torch.int32) & _BF16_UNUSED_BITS
            if bits.any():
                self._exact_in.discard(torch.bfloat16)


def _require_finite(piece: torch.Tensor, where: str) -> None:
    if piece.dtype not in _NAMES:
        raise CheckpointError(f"{where} is {piece.dtype}; weights are {', '.join(DTYPES)}")
    if _are_finite(piece):
        return
    nans, infinities = int(torch.isnan(piece).sum()), int(torch.isinf(piece).sum())
    raise CheckpointError(
        f"{where} holds {nans} NaN and {infinities} infinite values among {piece.numel()} looked "
        "at: the model is broken, or its file is damaged"
    )


def _are_finite(piece: torch.Tensor) -> bool:
    # several times faster than torch.isfinite, and NaN wins every comparison
    low, high = torch.aminmax(piece) if piece.numel() else (torch.zeros(()),) * 2
    return bool(torch.isfinite(low) and torch.isfinite(high))
