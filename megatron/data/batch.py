"""One micro batch on every tensor-parallel rank: broadcast, then inputs, labels and loss mask.

Tokens travel in the type they are stored in (2 bytes instead of 8) and become int64 on the device.
There is no attention mask and no position ids: attention is causal and positions run 0..S-1.
"""

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, distributed

__all__ = ["broadcast_tokens", "split_tokens"]


def broadcast_tokens(
    tokens: NDArray[np.integer] | None,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    group: distributed.ProcessGroup | None,
    source_rank: int,
    device: torch.device,
) -> Tensor:
    """Return the source's ``tokens`` on every rank of ``group``, as int64 on ``device``.

    A collective: every rank of ``group`` calls it with the same ``shape`` and ``dtype``.

    Args:
        tokens: the micro batch on the source; ignored, and best None, elsewhere.
        shape: (micro_batch_size, seq_length + 1), or with labels (micro_batch_size, 2,
            seq_length + 1).
        dtype: the integer type tokens are stored in.
        group: who receives; None or a group of one needs no communication.
        source_rank: global rank of the one that has ``tokens``.

    Raises:
        ValueError: ``tokens`` on the source is missing or not of that shape and type.
    """
    dtype = np.dtype(dtype)
    if group is None or group.size() == 1:
        return _to_int64(_bytes_on_device(tokens, shape, dtype, device), dtype)
    if distributed.get_rank() == source_rank:
        raw = _bytes_on_device(tokens, shape, dtype, device)
    else:
        in_bytes = (*shape[:-1], shape[-1] * dtype.itemsize)
        raw = torch.empty(in_bytes, dtype=torch.uint8, device=device)
    distributed.broadcast(raw, src=source_rank, group=group)
    return _to_int64(raw, dtype)


def split_tokens(
    tokens: Tensor, *, eod: int | None, eod_mask_loss: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the model reads, what it must predict, and which predictions count.

    Args:
        tokens: int64, (micro_batch_size, seq_length + 1); with labels (micro_batch_size, 2,
            seq_length + 1). A label stands where its token does; a negative one isn't learned.
        eod: id of the end-of-document token, if the vocabulary has one.
        eod_mask_loss: predictions made from an end-of-document token do not count.

    Returns:
        Inputs and labels, int64, and the loss mask, float32; each (micro_batch_size, seq_length).

    Raises:
        ValueError: ``eod_mask_loss`` without an ``eod``.
    """
    targets = tokens
    if tokens.dim() == 3:
        tokens, targets = tokens.unbind(1)
    inputs = tokens[:, :-1].contiguous()
    labels = targets[:, 1:].contiguous()
    counts = labels >= 0
    if targets is not tokens:
        labels = labels.clamp_(min=0)  # an id is needed there, whichever
    if eod_mask_loss:
        if eod is None:
            raise ValueError("eod_mask_loss needs a tokenizer with an end-of-document token")
        counts &= inputs != eod
    return inputs, labels, counts.float()


def _bytes_on_device(
    tokens: NDArray[np.integer] | None,
    shape: tuple[int, ...],
    dtype: np.dtype[np.integer],
    device: torch.device,
) -> Tensor:
    if tokens is None or tokens.shape != shape or tokens.dtype != dtype:
        given = "nothing" if tokens is None else f"{tokens.dtype} of shape {tokens.shape}"
        raise ValueError(f"the source must give {dtype} tokens of shape {shape}, got {given}")
    # torch refuses read-only memory, which is what a memory-mapped file gives.
    owned = np.require(tokens, requirements=["C_CONTIGUOUS", "WRITEABLE"])
    return torch.from_numpy(owned.view(np.uint8)).to(device)


def _to_int64(raw: Tensor, dtype: np.dtype[np.integer]) -> Tensor:
    if dtype == np.uint16:
        # torch's own uint16 has few kernels; the bits of an int16 say the same.
        return raw.view(torch.int16).to(torch.int64) & 0xFFFF
    return raw.view(_SIGNED_AND_BYTE[dtype.name]).to(torch.int64)


_SIGNED_AND_BYTE = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
}
