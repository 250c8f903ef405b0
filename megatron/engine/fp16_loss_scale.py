"""The loss scale of fp16 without ZeRO, which DeepSpeed forgets to put on.

Its optimizers for that case divide gradients by the scale, but since backward hooks were reworked
its engine multiplies the loss for ZeRO's optimizers only (0.19.8). Gradients then are too small by
the scale: Adam hides most of it, but small ones are lost in fp16, nothing is ever clipped, and
moments carried over from elsewhere outweigh them.
"""

from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

__all__ = ["scale_losses"]


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


def _scaled(engine: Any, loss: torch.Tensor) -> torch.Tensor:
    if not loss.requires_grad:
        return loss
    scale = engine.optimizer.loss_scale
    loss.register_hook(lambda gradient: gradient * scale)
    return loss
