"""Imports megatron-core without what training never uses of it: 1.1 s of processor time, not 3.3.

Every rank of every launch pays for that import, and where ranks outnumber cores they pay in turn.
Two thirds of it are torch's compilers, which load when a function is first given to
``torch.compile``, as megatron-core's fused kernels are while their modules are read; W&B, for its
inference; and TensorBoard, for its timers.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["light_import"]

_LEFT_OUT = ("wandb", "torch.utils.tensorboard")  # megatron-core does without, if they are missing


@contextlib.contextmanager
def light_import() -> Iterator[None]:
    """Import megatron-core within this: compilation waits for the first call of a function."""
    absent = [name for name in _LEFT_OUT if name not in sys.modules]
    compile_now = torch.compile
    torch.compile = functools.partial(_compiled_when_called, compile_now)
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type] # None: can't be imported
    try:
        yield
    finally:
        torch.compile = compile_now
        for name in absent:
            sys.modules.pop(name, None)


def _compiled_when_called(
    compile_now: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """Stand in for ``torch.compile``, as function and as decorator with options."""
    if function is None:
        return functools.partial(_compiled_when_called, compile_now, **options)
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*positional: Any, **named: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = compile_now(function, **options)
        return compiled(*positional, **named)

    return call
