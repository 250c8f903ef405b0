"""Imports megatron-core without what training never uses of it: half the processor time.

Every rank of every launch pays for that import, and where ranks outnumber cores they pay in turn.
Most of it are torch's compilers, which load when a function is given to ``torch.compile``, as
fused kernels are while their modules are read; then W&B, for megatron-core's inference, and
TensorBoard, for its timers.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["compiled_when_called", "light_import"]

_LEFT_OUT = ("wandb", "torch.utils.tensorboard")  # megatron-core does without, if they are missing


@contextlib.contextmanager
def light_import() -> Iterator[None]:
    """Import megatron-core within this."""
    absent = [name for name in _LEFT_OUT if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type] # None: can't be imported
    try:
        with compiled_when_called():
            yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


@contextlib.contextmanager
def compiled_when_called() -> Iterator[None]:
    """Let functions that are given to ``torch.compile`` in here be compiled by their first call."""
    compile_now = torch.compile
    torch.compile = functools.partial(_compiled_when_called, compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now


def _compiled_when_called(
    compile_now: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """Stand in for ``torch.compile``, as function and as decorator with options."""
    if function is None:
        return functools.partial(_compiled_when_called, compile_now, **options)
    if isinstance(function, torch.nn.Module):  # what comes back is a module too
        return compile_now(function, **options)
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*positional: Any, **named: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = compile_now(function, **options)
        return compiled(*positional, **named)

    return call
