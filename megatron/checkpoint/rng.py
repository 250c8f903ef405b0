"""The random states of a rank, under NeoX's names."""

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.activation_checkpointing import checkpointing

from megatron.base.errors import CheckpointError

__all__ = ["capture_rng_states", "require_rng_states", "restore_rng_states"]

logger = logging.getLogger(__name__)

_NAMES = (
    "random_rng_state",
    "np_rng_state",
    "torch_rng_state",
    "cuda_rng_state",
    "rng_tracker_states",
)


def capture_rng_states() -> dict[str, Any]:
    """Return the states of Python, NumPy, torch, the accelerator and the tensor-parallel stream.

    Without an accelerator ``cuda_rng_state`` is the CPU generator's, once more.
    """
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": get_accelerator().get_rng_state(),
        "rng_tracker_states": dict(checkpointing.get_cuda_rng_tracker().get_states()),
    }


def require_rng_states(saved: Mapping[str, Any], *, source: str) -> None:
    """Check that ``saved``, the content of the file ``source``, holds every state.

    Raises:
        CheckpointError: one is missing.
    """
    missing = [name for name in _NAMES if name not in saved]
    if missing:
        raise CheckpointError(
            f"{source} holds no {', '.join(missing)} (saved with no_save_rng?); "
            "set no_load_rng: true to go on with newly seeded random states"
        )


def restore_rng_states(saved: Mapping[str, Any], *, source: str) -> None:
    """Set the states that :func:`capture_rng_states` returned.

    Device states of another kind of device (a GPU's on a CPU) are left as they are, with a
    warning: random numbers then differ from those of an uninterrupted run, samples don't.

    Args:
        saved: what a model-states file holds.
        source: that file, for messages.
    """
    random.setstate(saved["random_rng_state"])
    np.random.set_state(saved["np_rng_state"])
    torch.set_rng_state(saved["torch_rng_state"].clone())
    device_state = saved["cuda_rng_state"]
    streams = saved["rng_tracker_states"]
    here = get_accelerator().get_rng_state()
    if any(state.shape != here.shape for state in (device_state, *streams.values())):
        logger.warning(
            "%s was written on another kind of device: its random states don't fit %s. Dropout "
            "goes on from this run's seed; the order of samples is not affected",
            source,
            get_accelerator().device_name(),
        )
        return
    get_accelerator().set_rng_state(device_state.clone())
    checkpointing.get_cuda_rng_tracker().set_states(
        {name: state.clone() for name, state in streams.items()}
    )
