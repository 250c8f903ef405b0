"""The optimizer the configuration names, for the device training runs on."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from megatron.base.errors import ConfigError

__all__ = ["build_optimizer"]

_DEFAULTS = {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8}


def build_optimizer(
    groups: Sequence[dict[str, Any]],
    *,
    optimizer_type: str,
    params: Mapping[str, Any],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Return the optimizer over ``groups``.

    ``adam`` is decoupled AdamW with bias correction, as in NeoX (spec/training.md §2): NVIDIA
    apex's fused kernel on a GPU where it is installed, else torch's (fused on a GPU).

    Args:
        groups: parameter groups, from :func:`megatron.optim.param_groups.weight_decay_groups`.
        optimizer_type: ``optimizer.type`` of the configuration, in any case.
        params: ``optimizer.params``.
        weight_decay: decay of the groups that don't set their own.

    Raises:
        ConfigError: an optimizer or a parameter we don't know.
    """
    if optimizer_type.lower() not in ("adam", "adamw"):
        raise ConfigError(
            f"optimizer type {optimizer_type!r} is known to NeoX, not supported here yet; use Adam"
        )
    known = {**_DEFAULTS, "weight_decay": weight_decay}
    # The keys NeoX derives with for other optimizers say nothing to Adam.
    ignored = {"freeze_step", "momentum", "cuda_aware", "torch_adam", "adam_w_mode"}
    unknown = sorted(set(params) - set(known) - ignored)
    if unknown:
        raise ConfigError(f"optimizer.params: Adam has no {unknown}; it knows {sorted(known)}")
    chosen = {key: params.get(key, default) for key, default in known.items()}
    chosen["betas"] = tuple(chosen["betas"])
    on_cpu = get_accelerator().device_name() == "cpu"
    if not on_cpu and _has_nvidia_apex():
        from apex.optimizers import FusedAdam  # NVIDIA's, built from source by the user

        return FusedAdam(list(groups), adam_w_mode=True, **chosen)
    return torch.optim.AdamW(list(groups), fused=not on_cpu, **chosen)


def _has_nvidia_apex() -> bool:
    # PyPI's `apex` is an unrelated package without `apex.optimizers`.
    if importlib.util.find_spec("apex") is None:
        return False
    return importlib.util.find_spec("apex.optimizers") is not None
