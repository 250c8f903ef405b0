"""What the optimizers of NeoX v1.0's DeepSpeed do differently, as options of their own.

The rest of v1.0's optimization is the same here: Adam's formula, clipping by (norm + 1e-6), a norm
that counts a replicated gradient once, fp16 gradients added up and reduced in fp16, no hysteresis
without ZeRO. Facts are from runs of the old code (docs/differences.md, "NeoX v1.0").
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

__all__ = ["NEOX_MAIN", "OptimizerNumerics", "apply_optimizer_numerics"]


@dataclass(frozen=True)
class OptimizerNumerics:
    """Each option is off as in NeoX main."""

    counts_dummy_step: bool = False
    """A new optimizer has counted one step: update t has the bias correction of t + 1. v1.0's
    wrappers (fp16, bf16, ZeRO) step once on zero gradients when they are made."""

    doubles_scale_one_step_earlier: bool = False
    """ZeRO's loss scale doubles in the step number ``loss_scale_window`` after an overflow, or
    after the start, not in the one behind it."""

    @classmethod
    def of(cls, neox_version: Literal["main", "v1.0"]) -> "OptimizerNumerics":
        """Return the options of a NeoX version."""
        is_v1 = neox_version == "v1.0"
        return cls(counts_dummy_step=is_v1, doubles_scale_one_step_earlier=is_v1)


NEOX_MAIN = OptimizerNumerics()


def apply_optimizer_numerics(engine: Any, numerics: OptimizerNumerics) -> None:
    """Make the fresh optimizer of ``engine`` follow ``numerics``."""
    is_wrapped = engine.optimizer is not engine.basic_optimizer
    if numerics.counts_dummy_step and is_wrapped:
        _count_dummy_step(engine.basic_optimizer)
    if numerics.doubles_scale_one_step_earlier and _has_dynamic_scaler(engine.optimizer):
        _double_one_step_earlier(engine.optimizer)


def _count_dummy_step(optimizer: torch.optim.Optimizer) -> None:
    """Step on zero gradients at rate 0: moments are zeros then, and nothing decays."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    gradients = [one.grad for one in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _has_dynamic_scaler(optimizer: Any) -> bool:
    return bool(getattr(getattr(optimizer, "loss_scaler", None), "dynamic", False))


def _double_one_step_earlier(optimizer: Any) -> None:
    # The scaler object is pickled with every checkpoint, so the rule stands beside it: while it
    # decides, its last overflow lies one step further back. What is stored stays true.
    def update_scale(has_overflow: bool = False) -> None:
        scaler = optimizer.loss_scaler  # another object once a checkpoint is loaded
        if has_overflow:
            scaler.update_scale(True)
            return
        scaler.last_overflow_iter -= 1
        scaler.update_scale(False)
        scaler.last_overflow_iter += 1

    optimizer._update_scale = update_scale
