"""Runs of a tiny model that go on at another topology, and whole tensors to compare them by."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch._utils import _unflatten_dense_tensors

from megatron.checkpoint.weights import numbered_layers, unused_copies
from megatron.config.topology import Topology
from megatron.model.tp_layout import merge
from tests.checkpoint.tiny_run import TinyRun, TinySettings, as_batch
from tests.worlds import run_ranks

__all__ = ["TOPOLOGIES", "Tensors", "begin", "resume", "whole_tensors"]

STEP = 2  # of the checkpoint
MORE = 10  # steps after it

SMALL = {
    "num_layers": 3,
    "hidden_size": 32,
    "heads": 4,
    "seq_length": 16,
    "padded_vocab_size": 320,
}
TOPOLOGIES = {
    "1 process": TinySettings(Topology(1, 1, 1), **SMALL),
    "TP2": TinySettings(Topology(1, 1, 2), **SMALL),
    "PP2": TinySettings(Topology(2, 1, 1), **SMALL),
    "TP2 x PP2": TinySettings(Topology(2, 1, 2), **SMALL),
    "DP2": TinySettings(Topology(1, 2, 1), gradient_accumulation_steps=1, **SMALL),
    "DP2 ZeRO 0": TinySettings(
        Topology(1, 2, 1), gradient_accumulation_steps=1, zero_stage=0, **SMALL
    ),
}

Tensors = dict[tuple[str, int, str], np.ndarray]
"""(kind, layer, name) -> the whole tensor: weight, master, exp_avg, exp_avg_sq."""


def begin(settings: TinySettings, directory: Path) -> dict[str, Any]:
    """Train, save, train on; return what the run had at its save and its losses afterwards."""
    directory.mkdir(parents=True, exist_ok=True)

    def worker(context: Any) -> Any:
        run = TinyRun(context, settings)
        run.train(STEP, _batches(run))
        tensors, state = _tensors(run), run.state()
        run.save(directory)
        return tensors, state, run.train(MORE, _batches(run))

    return _collected(run_ranks(worker, settings.topology.world_size, directory), settings)


def resume(
    settings: TinySettings, source: Path, directory: Path, *, steps: int = MORE
) -> dict[str, Any]:
    """Load from ``source``, save to ``directory``, train on; return what was loaded and losses."""
    directory.mkdir(parents=True, exist_ok=True)

    def worker(context: Any) -> Any:
        run = TinyRun(context, settings)
        loaded = run.load(source / f"global_step{STEP}")
        tensors, state = _tensors(run), run.state()
        run.save(directory)
        return tensors, state, run.train(steps, _batches(run)), loaded

    return _collected(run_ranks(worker, settings.topology.world_size, directory), settings)


def _collected(results: list[Any], settings: TinySettings) -> dict[str, Any]:
    return {
        "tensors": whole_tensors([result[0] for result in results], settings),
        "states": [result[1] for result in results],
        # A pipeline's ranks all know the mean, a sequential module's each their own loss.
        "losses": np.mean([result[2] for result in results], axis=0).tolist(),
        "loaded": [result[3] for result in results if len(result) > 3],
    }


def whole_tensors(of_ranks: list[Tensors], settings: TinySettings) -> Tensors:
    """Return the merged tensors of all stages, having compared those that ranks share."""
    topology = settings.topology
    parts: dict[tuple[str, int, str], dict[int, np.ndarray]] = {}
    for rank, tensors in enumerate(of_ranks):
        tensor_rank = topology.coordinates(rank).tensor_parallel_rank
        for key, tensor in tensors.items():
            # Data-parallel ranks, and the stages that share the embedding, must agree.
            same = parts.setdefault(key, {}).setdefault(tensor_rank, tensor)
            assert np.array_equal(same, tensor), key
    return {
        key: merge(
            key[2], [torch.from_numpy(by_rank[rank]) for rank in sorted(by_rank)], settings.model
        ).numpy()
        for key, by_rank in parts.items()
    }


def _batches(run: TinyRun) -> Any:
    """Return the micro batches of a step, the same samples at any data-parallel size."""
    topology, place = run.settings.topology, run.groups.place

    def of_step(iteration: int) -> Any:
        for micro_step in range(run.settings.gradient_accumulation_steps):
            number = micro_step * topology.data_parallel_size + place.data_parallel_rank
            generator = np.random.default_rng([iteration, number])
            yield as_batch(generator.integers(0, 300, size=(4, run.settings.seq_length + 1)))

    return of_step


def _tensors(run: TinyRun) -> Tensors:
    """Return this rank's weights and optimizer state, whole vectors taken apart by torch."""
    unused = unused_copies(run.module)
    names = {
        id(parameter): (layer, name)
        for layer, module in numbered_layers(run.module).items()
        for name, parameter in module.named_parameters()
    }
    tensors: Tensors = {}
    for parameters, states in _optimizer_groups(run.engine):
        for index, parameter in enumerate(parameters):
            layer, name = names.pop(id(parameter))
            if id(parameter) in unused:
                continue
            tensors["weight", layer, name] = parameter.detach().float().numpy().copy()
            for kind, values in states.items():
                tensors[kind, layer, name] = values[index].detach().numpy().copy()
    assert not names, "parameters that no group of the optimizer holds"
    return tensors


def _optimizer_groups(engine: Any) -> Any:
    optimizer, basic = engine.optimizer, engine.basic_optimizer
    if hasattr(optimizer, "real_dp_process_group"):
        groups = getattr(optimizer, "round_robin_bit16_groups", None) or optimizer.bf16_groups
        for parameters, group, process_group in zip(
            groups, basic.param_groups, optimizer.real_dp_process_group, strict=True
        ):
            (vector,) = group["params"]
            kinds = {"master": vector, **_moments(basic, vector)}
            yield (
                parameters,
                {
                    kind: _unflatten_dense_tensors(_gathered(part, process_group), parameters)
                    for kind, part in kinds.items()
                },
            )
        return
    module_groups = getattr(optimizer, "fp16_groups", None)
    for number, group in enumerate(basic.param_groups):
        masters = group["params"]
        states = {"master": masters}
        for kind in _moments(basic, masters[0]):
            states[kind] = [basic.state[master][kind] for master in masters]
        yield (module_groups[number] if module_groups else masters), states


def _moments(basic: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    entry = basic.state[tensor]
    return {kind: entry[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in entry}


def _gathered(part: torch.Tensor, process_group: Any) -> torch.Tensor:
    size = torch.distributed.get_world_size(process_group)
    parts = [torch.empty_like(part, requires_grad=False) for _ in range(size)]
    torch.distributed.all_gather(parts, part.detach().contiguous(), group=process_group)
    return torch.cat(parts)
