"""The flat keys that repeat what the optimizer and ZeRO blocks say."""

from typing import Any

from megatron.base.errors import ConfigError
from megatron.config.coercion import coerce
from megatron.config.draft import Draft, reads
from megatron.config.registry import keys

__all__ = ["derive_onebit_schedule", "derive_optimizer", "derive_zero"]

_ZERO_DEFAULTS: dict[str, Any] = {
    "stage": 0,
    "allgather_partitions": True,
    "reduce_scatter": True,
    "allgather_bucket_size": 500_000_000,
    "overlap_comm": False,
    "reduce_bucket_size": 500_000_000,
    "contiguous_gradients": False,
}
_DEFAULT_LR = 0.001


@reads("zero_optimization", "autotuning")
def derive_zero(draft: Draft) -> dict[str, Any]:
    """Settle the ZeRO block and repeat its members as flat keys.

    Raises:
        ConfigError: ``stage`` is missing or not 0 to 3.
    """
    block = draft["zero_optimization"]
    if block is None:
        block = dict(_ZERO_DEFAULTS)
    if "stage" not in block:
        raise ConfigError(f'{draft.say("zero_optimization")} must have "stage", 0 to 3')
    stage = block["stage"]
    is_stage = type(stage) is int and 0 <= stage <= 3
    if not is_stage and not draft["autotuning"]:
        raise ConfigError(
            f"{draft.origin('zero_optimization')}: zero_optimization.stage must be 0 to 3, "
            f"got {stage!r}"
        )
    flat = ("reduce_scatter", "contiguous_gradients", "reduce_bucket_size", "allgather_bucket_size")
    return {
        "zero_optimization": block,
        "zero_stage": stage,
        **{f"zero_{name}": block.get(name, _ZERO_DEFAULTS[name]) for name in flat},
    }


@reads("optimizer")
def derive_optimizer(draft: Draft) -> dict[str, Any]:
    """Repeat the optimizer's type and learning rate as flat keys.

    Raises:
        ConfigError: the block lacks ``type`` or ``params``, or the type is unknown.
    """
    block = draft["optimizer"]
    if block is None:
        return {"optimizer_type": "adam", "lr": _DEFAULT_LR}
    where = draft.origin("optimizer")
    problems = []
    if type(block.get("type")) is not str:
        problems.append(f'{where}: optimizer must have "type", a name such as Adam, got {block}')
    if type(block.get("params")) is not dict:
        problems.append(
            f'{where}: optimizer must have "params", such as {{"lr": 0.001}}, got {block}'
        )
    if problems:
        raise ConfigError(*problems)
    try:
        optimizer_type = coerce(block["type"], keys()["optimizer_type"].annotation)
    except ValueError as error:
        hint = "; NeoX's Adam is AdamW: write Adam" if block["type"].lower() == "adamw" else ""
        problems.append(f"{where}: optimizer.type {error}{hint}")
    try:
        lr = coerce(block["params"].get("lr", _DEFAULT_LR), float)
    except ValueError as error:
        problems.append(f"{where}: optimizer.params.lr {error}")
    if problems:
        raise ConfigError(*problems)
    return {"optimizer_type": optimizer_type, "lr": lr}


@reads("optimizer", "train_iters", "lr_decay_iters", "warmup")
def derive_onebit_schedule(draft: Draft) -> dict[str, Any]:
    """Give one-bit Adam the DeepSpeed schedule that NeoX gives it.

    Raises:
        ConfigError: one-bit Adam without ``train_iters``.
    """
    if draft["optimizer_type"] != "onebitadam":
        return {}
    train_iters = draft["train_iters"]
    if train_iters is None:
        raise ConfigError("one-bit Adam needs train_iters for its schedule")
    parameters = {
        "warmup_min_lr": 0,
        "warmup_max_lr": draft["lr"],
        "warmup_num_steps": int(train_iters * draft["warmup"]),
        "total_num_steps": draft["lr_decay_iters"] or train_iters,
    }
    return {"scheduler": {"type": "WarmupDecayLR", "params": parameters}}
