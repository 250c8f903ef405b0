"""Which parameters decay."""

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["NORM_CLASS_NAMES", "decays_by_name", "weight_decay_groups"]

# NeoX decides by class name; a norm class of ours must carry one of these.
NORM_CLASS_NAMES = frozenset(
    {
        "LayerNorm",
        "MixedFusedLayerNorm",
        "MixedFusedRMSNorm",
        "RMSNorm",
        "ScaleNorm",
        "TELayerNorm",
        "TERMSNorm",
    }
)

# What a layer calls its norms, of whatever class.
_NORM_MODULES = frozenset({"input_layernorm", "post_attention_layernorm", "norm", "qk_layernorm"})


def decays_by_name(name: str) -> bool:
    """Whether the parameter called ``name`` (with or without a layer's number) decays.

    Where no module is at hand, as for a stored checkpoint; the same as :func:`weight_decay_groups`.

    Example:
        >>> decays_by_name("2.mlp.linear1.weight"), decays_by_name("7.norm.scale")
        (True, False)
    """
    *modules, kind = name.split(".")
    return kind != "bias" and not _NORM_MODULES.intersection(modules)


def weight_decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer groups of ``module``: those that decay, then those that don't.

    Norms, biases and parameters flagged ``_no_weight_decay`` don't decay. Frozen parameters are
    left out, a shared one is listed where it comes first. The order inside a group is the order of
    ``module.modules()``: ZeRO's flat partitions, and so the checkpoints, depend on it.

    Args:
        module: one pipeline stage, or the whole model.
        weight_decay: the configured decay. At 0 there is a single group; otherwise the decaying
            group leaves its value to the optimizer's default, as NeoX does.
    """
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter, decays in _classified(module):
        (decaying if decays and weight_decay != 0.0 else others).append(parameter)
    no_decay_group = {"params": others, "weight_decay": 0.0, "name": "no_weight_decay_params"}
    if weight_decay == 0.0:
        return [no_decay_group]
    return [{"params": decaying, "name": "weight_decay_params"}, no_decay_group]


def _classified(module: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    seen: set[int] = set()
    for owner in module.modules():
        is_norm = type(owner).__name__ in NORM_CLASS_NAMES
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            is_exempt = is_norm or name == "bias" or getattr(parameter, "_no_weight_decay", False)
            yield parameter, not is_exempt
