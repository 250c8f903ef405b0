"""What DeepSpeed is told: NeoX's forwarded keys, and what NeoX forgets to forward."""

from collections.abc import Mapping
from typing import Any

from megatron.config.batch_geometry import BatchGeometry

__all__ = ["deepspeed_settings"]

# We build the optimizer and the schedule ourselves (as NeoX does); the rest is not DeepSpeed's.
_NOT_FORWARDED = {"deepspeed", "optimizer", "scheduler", "deepspeed_extra_args", "autotuning"}
_SILENT = 10**9  # DeepSpeed's own progress print, when the user did not ask for it


def deepspeed_settings(
    non_default: Mapping[str, Any],
    *,
    geometry: BatchGeometry,
    precision: str,
    fp16: Mapping[str, Any] | None,
    bf16: Mapping[str, Any] | None,
    gradient_clipping: float,
    zero_optimization: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Args:
        non_default: DeepSpeed keys whose value is not NeoX's default, as NeoX forwards them.
        geometry: the resolved batch sizes.
        precision: ``fp32``, ``fp16`` or ``bfloat16``.
        fp16: the fp16 block, used for precision fp16.
        bf16: the bf16 block, used for precision bfloat16.
        gradient_clipping: the limit to apply. Always forwarded: NeoX leaves out its default of
            1.0 and so trains unclipped (docs/differences.md).
        zero_optimization: the ZeRO block; None is stage 0.
        extra: ``deepspeed_extra_args``, which win over everything else.
    """
    settings = {key: value for key, value in non_default.items() if key not in _NOT_FORWARDED}
    settings.update(
        train_batch_size=geometry.global_batch_size,
        train_micro_batch_size_per_gpu=geometry.micro_batch_size,
        gradient_accumulation_steps=geometry.gradient_accumulation_steps,
        gradient_clipping=float(gradient_clipping),
        zero_optimization=dict(zero_optimization or {"stage": 0}),
        zero_allow_untested_optimizer=True,
    )
    settings.setdefault("steps_per_print", _SILENT)
    for block in ("fp16", "bf16"):
        settings.pop(block, None)
    if precision == "fp16":
        settings["fp16"] = _loss_scaling(fp16 or {})
    elif precision == "bfloat16":
        settings["bf16"] = {**(bf16 or {}), "enabled": True}
    settings.update(extra or {})
    return settings


def _loss_scaling(fp16: Mapping[str, Any]) -> dict[str, Any]:
    # v1.0's spellings of the precision (Pythia's files have `fp16`), not options of DeepSpeed's.
    spellings = ("fp16", "type", "auto_cast")
    block = {key: value for key, value in fp16.items() if key not in spellings}
    block["enabled"] = True
    return block
