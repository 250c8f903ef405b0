"""Keys of the learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal

from megatron.config.declare import WORKS, key

__all__ = ["LRScheduler"]


@dataclass(frozen=True, kw_only=True)
class LRScheduler:
    """Warmup, decay, and what a resumed run takes from its checkpoint."""

    lr_decay_style: Literal["constant", "linear", "cosine", "exponential"] | None = key(
        "linear", outcome=WORKS
    )
    """Shape of the learning rate after warmup."""

    lr_decay_iters: int | None = key(None, unit="steps", minimum=0, outcome=WORKS)
    """Step at which the decay ends. Unset: ``lr_decay_fraction`` of ``train_iters``, or all."""

    lr_decay_fraction: float | None = key(
        None, tier=2, unit="of train_iters", minimum=0, maximum=1, outcome=WORKS
    )
    """End of the decay as a part of ``train_iters``; read only if ``lr_decay_iters`` is unset."""

    min_lr: float | None = key(0.0, unit="learning rate", minimum=0, outcome=WORKS)
    """The learning rate never falls below this, warmup included; at most ``lr``."""

    warmup: float | None = key(0.01, unit="of the decay steps", minimum=0, maximum=1, outcome=WORKS)
    """Part of the decay steps over which the learning rate rises to its peak."""

    override_lr_scheduler: bool | None = key(False, outcome=WORKS)
    """On resume follow this configuration's schedule and ignore the checkpoint's."""

    use_checkpoint_lr_scheduler: bool | None = key(False, outcome=WORKS)
    """On resume follow the checkpoint's schedule and ignore this configuration's. With neither flag
    the two must agree."""
