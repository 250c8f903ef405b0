"""Which precision is meant by the three ways of saying it."""

from typing import Any

from megatron.base.errors import ConfigError
from megatron.config.draft import Draft, reads

__all__ = ["derive_loss_scale", "derive_precision"]


@reads("precision", "fp16", "bf16", "deepspeed_extra_args")
def derive_precision(draft: Draft) -> dict[str, Any]:
    """Settle ``precision`` from itself and the fp16 and bf16 blocks, and enable its block.

    Raises:
        ConfigError: two keys ask for different precisions, or a block doesn't say ``enabled``.
    """
    fp16, bf16 = draft["fp16"], draft["bf16"]
    extra = draft["deepspeed_extra_args"] or {}
    for name, block in (("fp16", fp16), ("bf16", bf16)):
        if block and "enabled" not in block:
            raise ConfigError(
                f'{draft.origin(name)}: {name} must say "enabled": true or false, got {block}'
            )
    asked = {}  # how it was said -> the precision it means
    if draft["precision"] is not None:
        asked[draft.say("precision")] = draft["precision"]
    if fp16 and fp16["enabled"]:
        # v1.0's way of asking for bfloat16
        meant = "bfloat16" if fp16.get("type") == "bfloat16" else "fp16"
        asked[f"{draft.say('fp16')}"] = meant
    if bf16 and bf16["enabled"]:
        asked[f"{draft.say('bf16')}"] = "bfloat16"
    if (extra.get("bf16") or {}).get("enabled"):
        asked[f"{draft.say('deepspeed_extra_args')}"] = "bfloat16"
    if len(set(asked.values())) > 1:
        said = " but ".join(f"{how} means {what}" for how, what in asked.items())
        raise ConfigError(f"conflicting precisions: {said}; keep one")
    precision = next(iter(asked.values()), "fp32")
    changes: dict[str, Any] = {"precision": precision}
    if precision == "fp16":
        changes["fp16"] = {**fp16, "enabled": True} if fp16 else {"type": "fp16", "enabled": True}
    elif precision == "bfloat16" and bf16:
        changes["bf16"] = {**bf16, "enabled": True}
    elif precision == "bfloat16":
        changes["deepspeed_extra_args"] = {"bf16": {"enabled": True}, **extra}
    return changes


@reads("loss_scale")
def derive_loss_scale(draft: Draft) -> dict[str, Any]:
    """Tell whether the old top-level ``loss_scale`` is unset."""
    return {"dynamic_loss_scale": draft["loss_scale"] is None}
