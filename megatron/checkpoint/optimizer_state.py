"""Optimizer state: as the optimizer of this run wants it, and as NeoX's FusedAdam wants it.

Three places hold the number of steps taken: apex's FusedAdam keeps it in the group, torch's AdamW
in every parameter's state as a tensor, and DeepSpeed's FusedAdam as an integer in the state of the
last parameter of a group only (0 elsewhere). Readers take the largest, writers fill all.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron.base.errors import CheckpointError

__all__ = [
    "AdaptedState",
    "adapt_optimizer_state",
    "changed_settings",
    "restored_group",
    "steps_taken",
    "with_fused_adam_keys",
]

# Settings the configuration decides, with a notice if the checkpoint had others. (NeoX goes on with
# the checkpoint's without a word.) Of a stored group only the learning rate is taken over: torch's
# loader would fill what NeoX's lacks with defaults, among them coupled weight decay.
_CONFIGURED = ("betas", "eps", "weight_decay")


@dataclass(frozen=True)
class AdaptedState:
    """State that the live optimizer loads, and what a user should know about it."""

    state: dict[str, Any]  # as torch.optim.Optimizer.state_dict() gives it
    notices: tuple[str, ...]


def with_fused_adam_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's ``state_dict`` so that NeoX's FusedAdam can load it too."""
    groups = [dict(group) for group in state["param_groups"]]
    states = {index: dict(entry) for index, entry in state["state"].items()}
    for group in groups:
        step = steps_taken(group, states)
        group.setdefault("bias_correction", True)
        group["step"] = step
        if "betas" in group:
            group["betas"] = list(group["betas"])
        for index in group["params"]:
            if "step" in states.get(index, {}):
                states[index]["step"] = step
    return {**state, "state": states, "param_groups": groups}


def adapt_optimizer_state(
    saved: Any,
    live_groups: Sequence[Mapping[str, Any]],
    *,
    gradient_multiple: int,
    source: str,
) -> AdaptedState:
    """Return ``saved`` as the live optimizer can load it, in memory of its own.

    Args:
        saved: the ``state_dict`` of the optimizer that wrote the checkpoint.
        live_groups: ``param_groups`` of this run's optimizer.
        gradient_multiple: the writer's moments are those of gradients this many times ours.
        source: the file, for messages.

    Raises:
        CheckpointError: groups or parameters don't correspond.
    """
    if not isinstance(saved, Mapping) or "param_groups" not in saved:
        raise CheckpointError(
            f"{source} holds optimizer state of an elastic or older ZeRO format, which cannot be "
            "read yet; load the weights alone with no_load_optim: true or finetune: true"
        )
    _require_same_groups(saved["param_groups"], live_groups, source)
    notices: dict[str, None] = {}
    states: dict[int, dict[str, Any]] = {}
    groups = []
    for old, live in zip(saved["param_groups"], live_groups, strict=True):
        step = steps_taken(old, saved["state"])
        notices.update(dict.fromkeys(changed_settings(old, live)))
        groups.append(restored_group(live, lr=old["lr"], step=step, numbers=old["params"]))
        for index, parameter in zip(old["params"], live["params"], strict=True):
            if index in saved["state"]:
                entry = saved["state"][index]
                _require_same_size(entry, parameter, source)
                states[index] = _adapted_entry(entry, step, gradient_multiple)
    return AdaptedState({"state": states, "param_groups": groups}, tuple(notices))


def steps_taken(group: Mapping[str, Any], states: Mapping[Any, Mapping[str, Any]]) -> int:
    """Return the steps that an optimizer's group has taken, wherever its kind counts them."""
    counts = [states[index].get("step", 0) for index in group["params"] if index in states]
    return max(int(count) for count in [group.get("step", 0), *counts])


def restored_group(
    live: Mapping[str, Any], *, lr: float, step: int, numbers: Iterable[Any]
) -> dict[str, Any]:
    """Return a group of a ``state_dict`` for the optimizer whose own group is ``live``.

    Args:
        live: of this run's optimizer, whose settings hold.
        lr: the learning rate saved last.
        step: steps taken.
        numbers: what the state calls the group's parameters.
    """
    group = {key: copy.copy(value) for key, value in live.items() if key != "params"}
    group.update(lr=lr, params=list(numbers))
    if "bias_correction" in live:  # apex's FusedAdam counts in the group, from its first step
        group["step"] = step
    return group


def _adapted_entry(entry: Mapping[str, Any], step: int, multiple: int) -> dict[str, Any]:
    adapted: dict[str, Any] = {}
    for name, value in entry.items():
        if name == "step":
            adapted[name] = step
        elif not torch.is_tensor(value):
            adapted[name] = value
        elif name == "exp_avg" and multiple != 1:
            adapted[name] = value / multiple
        elif name == "exp_avg_sq" and multiple != 1:
            adapted[name] = value / multiple**2
        else:
            adapted[name] = value.clone()
    return adapted


def _require_same_groups(
    old: Sequence[Mapping[str, Any]], live: Sequence[Mapping[str, Any]], source: str
) -> None:
    def shape(groups: Sequence[Mapping[str, Any]]) -> str:
        return ", ".join(
            f"{group.get('name', 'group')} with {len(group['params'])} tensors" for group in groups
        )

    if [len(group["params"]) for group in old] != [len(group["params"]) for group in live]:
        raise CheckpointError(
            f"{source} holds optimizer state for {shape(old)}; this run has {shape(live)} "
            "(did weight_decay change to or from 0?). To load the weights alone set "
            "no_load_optim: true"
        )


def _require_same_size(entry: Mapping[str, Any], parameter: torch.Tensor, source: str) -> None:
    for name, value in entry.items():
        if torch.is_tensor(value) and value.dim() and value.shape != parameter.shape:
            raise CheckpointError(
                f"{source}: the optimizer's {name} has shape {tuple(value.shape)}, this rank's "
                f"part has {tuple(parameter.shape)}: the file belongs to another model or rank"
            )


def changed_settings(old: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Return a notice for each setting of a stored group that the configuration changes."""
    return [
        f"optimizer {key}: {_plain(old[key])} in the checkpoint, {_plain(live[key])} in the "
        "configuration, which holds from here on"
        for key in _CONFIGURED
        if key in old and key in live and _plain(old[key]) != _plain(live[key])
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
