"""Keys that only NeoX v1.0 knows. (Its ``gas`` is an alias of gradient_accumulation_steps.)"""

from dataclasses import dataclass

from megatron.config.declare import key, no_effect

__all__ = ["Legacy"]


@dataclass(frozen=True, kw_only=True)
class Legacy:
    """Accepted so that published v1.0 configurations load."""

    zero_allow_untested_optimizer: bool | None = key(
        False, tier=2, outcome=no_effect("every optimizer here is allowed with ZeRO")
    )
    """Let DeepSpeed shard an optimizer it hasn't been tested with."""

    detect_nvlink_pairs: bool | None = key(
        False, tier=3, outcome=no_effect("GPUs are used in the order the machine gives them")
    )
    """Reorder a host's GPUs so that pairs joined by NVLink are neighbours."""

    save_iters: list[int] | None = key(
        None, tier=3, outcome=no_effect("v1.0 overwrites it; use extra_save_iters")
    )
    """Steps to save at, which v1.0 works out itself from checkpoint_factor and extra_save_iters."""
