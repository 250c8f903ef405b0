"""``deterministic: true``: kernels that give the same bits for the same inputs, on a GPU too.

On a CPU all kernels used here do so anyway. On a GPU some of the fast ones add up in whatever order
threads come along: cuBLAS with several workspaces, scatters and gathers by index, attention's
gradient. Where torch has no deterministic kernel it raises, at the first step, and names it.
"""

import os
from collections.abc import MutableMapping

import torch

__all__ = ["CUBLAS_WORKSPACES", "use_deterministic_kernels"]

CUBLAS_WORKSPACES = ":4096:8"  # eight of 4 MiB, NVIDIA's choice where memory isn't short
_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


def use_deterministic_kernels(environ: MutableMapping[str, str] = os.environ) -> None:
    """Choose them for this process, before it first touches a GPU.

    cuBLAS reads its variable when it is first used, so that no launcher needs to carry it; one that
    the user has set is left.
    """
    environ.setdefault(_VARIABLE, CUBLAS_WORKSPACES)
    torch.use_deterministic_algorithms(True)
    # Filling all new memory with NaN would find uninitialised reads, and slows every step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
