"""Optimizer state of any writer into the live engine: the way when a launch is divided otherwise.

Each rank reads what it holds, and every value is copied as it is: masters and moments are those of
the writer to the last bit, at whatever tensor, pipeline and data parallel size, ZeRO stage and
precision it wrote and this run trains.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron.base.errors import CheckpointError
from megatron.checkpoint.compatibility import WEIGHTS_ALONE, LoadSettings
from megatron.checkpoint.engine_optimizer import require_rounded
from megatron.checkpoint.flat_partitions import Kind
from megatron.checkpoint.live_optimizer import Fragment, Master, live_masters
from megatron.checkpoint.optimizer_state import changed_settings, restored_group
from megatron.checkpoint.parameter_state import (
    LossScale,
    ParameterStates,
    StoredGroup,
    open_parameter_states,
)
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.checkpoint.stored_layout import ParameterKey
from megatron.checkpoint.weights import (
    LayerWeights,
    copy_weights,
    numbered_layers,
    read_weights,
)

__all__ = ["Resharding", "apply_resharding", "prepare_resharding"]


@dataclass(frozen=True)
class Resharding:
    """Stored state that was found to fit this rank's part of the model; nothing is applied yet."""

    states: ParameterStates
    weights: LayerWeights
    keys: Mapping[int, ParameterKey]  # id of a live parameter -> what the files call it
    tensor_parallel_size: int
    tensor_rank: int
    notices: tuple[str, ...]

    def part(self, key: ParameterKey, kind: Kind) -> torch.Tensor:
        """Return this rank's part of a parameter's state."""
        return self.states.part(*key, kind, size=self.tensor_parallel_size, rank=self.tensor_rank)

    def elements(self, fragment: Fragment, kind: Kind) -> torch.Tensor:
        """Return the elements of a fragment, flat."""
        part = self.part(self.keys[id(fragment.parameter)], kind)
        return part.reshape(-1)[fragment.start : fragment.start + fragment.size]


def prepare_resharding(engine: Any, stored: StoredCheckpoint, settings: LoadSettings) -> Resharding:
    """Open and check everything that this rank will read; nothing changes.

    Raises:
        CheckpointError: state is missing or of another model, or was written by an optimizer that
            cannot be read.
    """
    states = open_parameter_states(stored, settings.model, adam_step=settings.adam_step)
    size = settings.topology.tensor_parallel_size
    rank = settings.tensor_rank
    weights = read_weights(
        stored,
        engine.module,
        settings=settings.model,
        tensor_parallel_size=size,
        tensor_rank=rank,
    )
    keys: dict[int, ParameterKey] = {}
    for layer, module in numbered_layers(engine.module).items():
        # Blocks share a table of relative positions, whose state stands under the first of them.
        live = {
            name: parameter
            for name, parameter in module.named_parameters()
            if id(parameter) not in keys
        }
        _require_same_names(states, layer, live)
        for name, parameter in live.items():
            shape = states.require(layer, name, size=size, rank=rank)
            if shape != parameter.shape:
                raise CheckpointError(
                    f"{stored.directory}: the optimizer state of {name} of layer {layer} has shape "
                    f"{tuple(shape)} for tensor rank {rank} of {size}, but this model needs "
                    f"{tuple(parameter.shape)}"
                )
            keys[id(parameter)] = layer, name
    return Resharding(
        states,
        weights,
        keys,
        size,
        rank,
        (*states.notices, *_changed_settings(engine, states)),
    )


def apply_resharding(engine: Any, resharding: Resharding) -> None:
    """Fill weights, masters, moments, groups and loss scale of ``engine``.

    Raises:
        CheckpointError: the stored weights are not the rounded masters, so that nothing tells which
            of them the run had.
    """
    states = resharding.states
    copy_weights(engine.module, resharding.weights)
    if states.weight_dtype != next(engine.module.parameters()).dtype:
        _round_masters_into_weights(engine, resharding)
    groups: list[dict[str, Any]] = []
    entries: dict[int, dict[str, Any]] = {}
    for live, masters in zip(
        engine.basic_optimizer.param_groups, live_masters(engine), strict=True
    ):
        numbers = range(len(entries), len(entries) + len(masters))
        stored = _stored_group(states, live)
        lr = stored.options.get("lr", live["lr"])
        groups.append(restored_group(live, lr=lr, step=states.step, numbers=numbers))
        for number, master in zip(numbers, masters, strict=True):
            _fill(master.tensor.detach(), master, resharding, "master")
            entries[number] = _moments(master, resharding) if states.has_moments else {}
    engine.basic_optimizer.load_state_dict(
        {"state": entries if states.has_moments else {}, "param_groups": groups}
    )
    _set_loss_scale(engine.optimizer, states.scaler)


def _moments(master: Master, resharding: Resharding) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": resharding.states.step}
    kinds: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
    for kind in kinds:
        entry[kind] = torch.zeros_like(master.tensor, requires_grad=False)
        _fill(entry[kind], master, resharding, kind)
    return entry


def _fill(target: torch.Tensor, master: Master, resharding: Resharding, kind: Kind) -> None:
    flat = target.view(-1)
    for fragment in master.fragments:
        flat[fragment.offset : fragment.offset + fragment.size].copy_(
            resharding.elements(fragment, kind)
        )


def _round_masters_into_weights(engine: Any, resharding: Resharding) -> None:
    """Give weights of another precision than the stored ones the masters' values."""
    for layer, module in numbered_layers(engine.module).items():
        for name, parameter in module.named_parameters():
            master = resharding.part(resharding.keys[id(parameter)], "master")
            require_rounded(
                master,
                resharding.weights[layer][name],
                directory=resharding.states.stored.directory,
            )
            with torch.no_grad():
                parameter.copy_(master)


def _set_loss_scale(optimizer: Any, stored: LossScale | None) -> None:
    """Continue the loss scale where both the writer's and this run's are dynamic."""
    if stored is None:
        return
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(
        optimizer, "loss_scale_config", None
    )
    if not (getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)):
        return
    scaler.cur_scale = stored.scale
    scaler.cur_iter = stored.iteration
    scaler.last_overflow_iter = stored.last_overflow_iteration
    if stored.hysteresis is not None and hasattr(scaler, "cur_hysteresis"):
        scaler.cur_hysteresis = stored.hysteresis


def _require_same_names(states: ParameterStates, layer: int, live: Mapping[str, Any]) -> None:
    stored = {name for number, name in states.names if number == layer}
    if missing := sorted(set(live) - stored):
        raise CheckpointError(
            f"{states.stored.directory}: the optimizer state of layer {layer} lacks "
            f"{', '.join(missing)}; {WEIGHTS_ALONE}"
        )
    if unexpected := sorted(stored - set(live)):
        raise CheckpointError(
            f"{states.stored.directory}: the optimizer state of layer {layer} also holds "
            f"{', '.join(unexpected)}: it belongs to another model; {WEIGHTS_ALONE}"
        )


def _stored_group(states: ParameterStates, live: Mapping[str, Any]) -> StoredGroup:
    # With a decay of 0 there is one group where there would be two.
    named = {group.name: group for group in states.groups}
    return named.get(live.get("name", ""), states.groups[0])


def _changed_settings(engine: Any, states: ParameterStates) -> list[str]:
    live_groups = engine.basic_optimizer.param_groups
    pairs = [(_stored_group(states, live), live) for live in live_groups]
    names = {live.get("name") for live in live_groups}
    pairs += [(group, live_groups[-1]) for group in states.groups if group.name not in names]
    changes = [changed_settings(stored.options, live) for stored, live in pairs]
    return list(dict.fromkeys(itertools.chain.from_iterable(changes)))
