"""Reading torch files that may come from the internet: data, never code.

Every torch file we open is opened here. It is first read as data without torch, by a machine that
knows no class (``base.torch_metadata``) and refuses what it doesn't know by name; then by torch's
restricted unpickler with the few classes below. Tensors are mapped, not read, until used.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megatron.base.errors import CheckpointError
from megatron.base.torch_metadata import inspect_torch_file, require_checksums

__all__ = ["read_torch_file"]

_reconstruct = np.ndarray(0).__reduce__()[0]

_ALLOWED: list[Any] = [
    # NumPy's random state; `core` is where NumPy 1, which NeoX uses, keeps the function.
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    # ZeRO's optimizer files.
    LossScaler,
    DynamicLossScaler,
    ZeroStageEnum,
    fragment_address,
]

_DAMAGES = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    MemoryError,
    OverflowError,
    AssertionError,
    pickle.UnpicklingError,
)


def read_torch_file(path: Path, *, is_verified: bool = False) -> Any:
    """Return the content of ``path`` with every tensor on the CPU.

    Tensors are private mappings of the file where its format allows. Clone what outlives the
    checkpoint directory.

    Args:
        path: the file.
        is_verified: its bytes have just been compared with a digest. Otherwise the file is read
            through once, since torch checks no checksum: a flipped bit in a moment would be
            trained on.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or holds anything but data.
    """
    inspected = inspect_torch_file(path)
    if not is_verified:
        require_checksums(inspected)
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            # A file of a torch before 1.6, or of DeepSpeed configured so, can't be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=inspected.is_zip)
    except _DAMAGES as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read; it is truncated, damaged, or "
            f"not a checkpoint file: {_first_sentence(error)}"
        ) from error


def _first_sentence(error: BaseException) -> str:
    # torch goes on for a paragraph about what may have happened
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.partition(". ")[0][:300]
