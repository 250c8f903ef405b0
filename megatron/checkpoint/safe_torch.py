"""Reading torch files that may come from the internet: data, never code.

Every torch file we open is opened here, with torch's restricted unpickler and the few classes
below that DeepSpeed and NumPy put into checkpoints. Tensors are mapped, not read, until used.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megatron.base.errors import CheckpointError

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
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def read_torch_file(path: Path) -> Any:
    """Return the content of ``path`` with every tensor on the CPU.

    Tensors are private mappings of the file where its format allows. Clone what outlives the
    checkpoint directory. The file is read through once, since torch checks no checksum: a flipped
    bit in a moment would be trained on.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or holds anything but data.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    # Written by torch before 1.6, or by DeepSpeed configured so: a plain pickle can't be mapped.
    is_mappable = zipfile.is_zipfile(path)
    try:
        if is_mappable:
            _require_intact(path)
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mappable)
    except _DAMAGES as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) cannot be read; it is truncated, damaged, or not a checkpoint "
            f"file: {_first_sentence(error)}"
        ) from error


def _require_intact(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of its part {damaged} does not match")


def _first_sentence(error: BaseException) -> str:
    # torch goes on for a paragraph about what may have happened
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.partition(". ")[0][:300]
