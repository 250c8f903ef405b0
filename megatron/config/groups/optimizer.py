"""Keys that follow from the optimizer and ZeRO blocks, and the 8-bit switch."""

from dataclasses import dataclass
from typing import Literal

from megatron.config.declare import WORKS, key, refused

__all__ = ["Optimizer"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Flat views of ``optimizer`` and ``zero_optimization``; written values are overwritten."""

    optimizer_type: (
        Literal[
            "adam",
            "onebitadam",
            "cpu_adam",
            "cpu_torch_adam",
            "sm3",
            "madgrad_wd",
            "sgd",
            "lion",
        ]
        | None
    ) = key("adam", is_derived=True, outcome=WORKS)
    """``type`` of ``optimizer``."""

    use_bnb_optimizer: bool | None = key(
        False, tier=3, outcome=refused("use the ordinary Adam: false")
    )
    """8-bit Adam and a stable embedding from bitsandbytes."""

    zero_stage: int | list[int] | Literal["all"] | None = key(None, is_derived=True, outcome=WORKS)
    """``stage`` of ``zero_optimization``."""

    zero_reduce_scatter: bool | None = key(None, tier=2, is_derived=True, outcome=WORKS)
    """``reduce_scatter`` of ``zero_optimization``."""

    zero_contiguous_gradients: bool | None = key(None, tier=2, is_derived=True, outcome=WORKS)
    """``contiguous_gradients`` of ``zero_optimization``."""

    zero_reduce_bucket_size: int | None = key(
        None, tier=2, unit="elements", is_derived=True, outcome=WORKS
    )
    """``reduce_bucket_size`` of ``zero_optimization``."""

    zero_allgather_bucket_size: int | None = key(
        None, tier=2, unit="elements", is_derived=True, outcome=WORKS
    )
    """``allgather_bucket_size`` of ``zero_optimization``."""

    lr: float | None = key(None, is_derived=True, minimum=0, outcome=WORKS)
    """Peak learning rate: ``lr`` of the optimizer's ``params``, 0.001 if it has none."""
