"""The loss scale of fp16 without ZeRO: DeepSpeed forgets to put it on, and to take it off a norm.

Its optimizers for that case divide gradients by the scale, but since backward hooks were reworked
its engine multiplies the loss for ZeRO's optimizers only (0.19.8). Gradients then are too small by
the scale: Adam hides most of it, but small ones are lost in fp16, nothing is ever clipped, and
moments carried over from elsewhere outweigh them.
"""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

__all__ = ["gradient_norm_of", "scale_losses"]


def scale_losses(engine: Any) -> None:
    """Let losses of ``engine`` send back gradients times the loss scale; their values stay."""
    if not engine.fp16_enabled() or not isinstance(
        engine.optimizer, FP16_Optimizer | FP16_UnfusedOptimizer
    ):
        return
    if isinstance(engine.module, PipelineModule):
        compute = engine.module.loss_fn
        engine.module.loss_fn = lambda *inputs: _scaled(engine, compute(*inputs))
        return
    backward = engine.backward
    engine.backward = lambda loss: backward(_scaled(engine, loss))


def gradient_norm_of(engine: Any) -> Callable[[], float | None]:
    """Return a function that gives the norm of the last step's gradients before clipping."""
    optimizer = engine.optimizer
    if not (engine.fp16_enabled() and isinstance(optimizer, FP16_UnfusedOptimizer)):
        return lambda: _as_number(engine.get_global_grad_norm())
    # This one keeps the norm of the scaled gradients, and may have changed the scale since.
    update_scale = optimizer._update_scale
    used_scale = float(optimizer.loss_scale)

    def remember_and_update(skip: bool) -> None:
        nonlocal used_scale
        used_scale = float(optimizer.loss_scale)
        update_scale(skip)

    def norm() -> float | None:
        scaled = _as_number(engine.get_global_grad_norm())
        return None if scaled is None else scaled / used_scale

    optimizer._update_scale = remember_and_update
    return norm


def _as_number(norm: Any) -> float | None:
    # A tensor or a float, depending on DeepSpeed's optimizer.
    return None if norm is None else float(norm)


def _scaled(engine: Any, loss: torch.Tensor) -> torch.Tensor:
    if not loss.requires_grad:
        return loss
    scale = engine.optimizer.loss_scale
    loss.register_hook(lambda gradient: gradient * scale)
    return loss
