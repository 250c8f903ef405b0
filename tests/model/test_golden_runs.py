"""NeoX's recorded training runs, from its initial weights, step by step."""

import json
import re
from pathlib import Path

import deepspeed  # noqa: F401 - warm before ranks are forked
import numpy as np
import pytest
import torch
import torch.distributed

from megatron.model.parallel_layers import TensorParallel
from tests.model.composed import ComposedModel, settings_of
from tests.worlds import RankContext, run_ranks

DATA = Path(__file__).parent.parent / "data" / "model"
RUNS = json.loads((DATA / "runs.json").read_text())
VOCABULARY = 2048


def _weights(run: str, tensor_rank: int) -> dict[str, torch.Tensor]:
    """Recorded tensors of one tensor rank, called ``<layer number>.<name>``."""
    tensors = {}
    with np.load(DATA / f"{run}.npz") as archive:
        for key in archive:
            in_file = re.fullmatch(r"layer_(\d+)-model_(\d+)-model_states.pt/(.+)", key)
            in_module = re.fullmatch(r"sequential\.(\d+)\.(.+)", key)
            if in_file and int(in_file[2]) == tensor_rank:
                tensors[f"{int(in_file[1])}.{in_file[3]}"] = torch.from_numpy(archive[key])
            elif in_module:
                tensors[f"{in_module[1]}.{in_module[2]}"] = torch.from_numpy(archive[key])
    return tensors


def _train(run: str, tensor_parallel: TensorParallel, *, multiplicity: int = 1) -> list[float]:
    config = RUNS[run]["config"]
    model = ComposedModel(
        settings_of(vocabulary=VOCABULARY, multiplicity=multiplicity, **config), tensor_parallel
    )
    model.load_state_dict(_weights(run, tensor_parallel.rank), strict=True)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    with np.load(DATA / f"{run}.npz") as archive:
        tokens = torch.from_numpy(archive["tokens"].astype(np.int64))
    # A step uses the rate logged after the one before it; the first uses its own.
    logged = RUNS[run]["learning_rates"]
    losses = []
    for step, rate in zip(tokens, [logged[0], *logged[:-1]], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        of_micro_steps = []
        for samples in step:
            loss = model.loss(samples)
            (loss / len(step)).backward()
            of_micro_steps.append(loss.item())
        _clip(parameters, tensor_parallel)
        optimizer.step()
        losses.append(sum(of_micro_steps) / len(of_micro_steps))
    return losses


def _clip(parameters: list[torch.nn.Parameter], tensor_parallel: TensorParallel) -> None:
    """Clip to norm 1, counting what every tensor rank holds once."""
    squares = torch.zeros(2)
    for parameter in parameters:
        is_divided = getattr(parameter, "tensor_model_parallel", False)
        squares[int(is_divided)] += parameter.grad.square().sum()
    if tensor_parallel.size > 1:
        torch.distributed.all_reduce(squares[1:], group=tensor_parallel.group)
    norm = squares.sum().sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)


@pytest.mark.parametrize("run", ["pp1", "llama_gqa", "tied_learned"])
def test_losses_are_neox_losses(run):
    assert _train(run, TensorParallel()) == pytest.approx(RUNS[run]["losses"], rel=1e-6)


@pytest.mark.distributed
def test_losses_of_two_tensor_ranks_are_neox_losses_with_every_bias_counted_twice(tmp_path):
    def worker(context: RankContext) -> tuple[list[float], list[float]]:
        torch.distributed.init_process_group(
            "gloo", init_method=context.init_method, rank=context.rank, world_size=2
        )
        tensor_parallel = TensorParallel.of_group(torch.distributed.group.WORLD)
        return (
            _train("tp2pp2", tensor_parallel, multiplicity=2),
            _train("tp2pp2", tensor_parallel, multiplicity=1),
        )

    twice, once = zip(*run_ranks(worker, 2, tmp_path), strict=True)
    assert twice[0] == twice[1]
    recorded = RUNS["tp2pp2"]["losses"]
    assert twice[0] == pytest.approx(recorded, rel=1e-6)
    # Biases begin at zero, so the multiplicity shows from the second step on.
    assert once[0][0] == pytest.approx(recorded[0], rel=1e-6)
    assert once[0][2] != pytest.approx(recorded[2], rel=5e-6)
