"""The first step after a checkpoint of NeoX v1.0, against the plain arithmetic written out."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from deepspeed.accelerator import get_accelerator

from megatron.checkpoint.live_optimizer import live_masters
from megatron.checkpoint.parameter_state import open_parameter_states
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.checkpoint.weights import numbered_layers
from megatron.cli.train import prepare
from megatron.config.load import load_config
from megatron.engine.distributed import RankEnvironment
from megatron.engine.steps import train_step
from megatron.model.layer_plan import layer_plan
from megatron.model.loss import cross_entropy_loss
from megatron.model.parallel_layers import TensorParallel
from tests.pythia.recorded_runs import continued_config, model_settings, unpack
from tests.worlds import RankContext, run_ranks

pytestmark = pytest.mark.distributed

RATE, BETAS, EPSILON, DECAY, SCALE = 1e-3, (0.9, 0.95), 1e-8, 0.1, 4096.0
STEP = 7  # five updates, the dummy step, and this one
Values = dict[tuple[int, str], torch.Tensor]


def step_of_ours(recorded: Path, tmp_path: Path) -> tuple[float, Values]:
    """Return loss and masters of one step on one process."""
    path = tmp_path / "config.yml"
    config = continued_config(recorded, num_gpus=1, gradient_accumulation_steps=2)
    path.write_text(yaml.safe_dump(config))
    resolved = load_config([path], {}, local_slots=lambda: 1)

    def rank_main(context: RankContext) -> Any:
        type(get_accelerator()).is_fp16_supported = lambda self: True
        environment = RankEnvironment(0, 0, 1, context.init_method)
        with contextlib.ExitStack() as stack:
            training = prepare(resolved, environment, stack).training
            engine = training.engine
            loss = train_step(
                engine, training.train_batches, training.loss_function, training.groups
            )
            names = {
                id(parameter): (layer, name)
                for layer, module in numbered_layers(engine.module).items()
                for name, parameter in module.named_parameters()
            }
            masters = {}
            for group in live_masters(engine):
                for master in group:
                    for part in master.fragments:
                        values = master.tensor.detach()[part.offset : part.offset + part.size]
                        masters[names[id(part.parameter)]] = values.view(part.parameter.shape)
            return loss, {key: value.numpy() for key, value in masters.items()}

    loss, masters = run_ranks(rank_main, 1, tmp_path)[0]
    return loss, {key: torch.from_numpy(value) for key, value in masters.items()}


class Reference:
    """The model in fp16 and one step of v1.0's, by hand (pythia.md §5.3 and §5.4)."""

    def __init__(self, recorded: Path) -> None:
        settings = model_settings(recorded)
        stored = StoredCheckpoint(recorded / "global_step5")
        self.states = open_parameter_states(stored, settings)
        plan = layer_plan(
            settings,
            TensorParallel(),
            seed=1,
            dtype=torch.float16,
            device=torch.device("cpu"),
            dropout_rng=contextlib.nullcontext,
        )
        self.layers = [(planned.index, planned.factory()) for planned in plan]
        self.parameters: dict[tuple[int, str], torch.nn.Parameter] = {}
        for index, layer in self.layers:
            if isinstance(layer, torch.nn.Module) and list(layer.parameters()):
                _, weights = stored.weights(index, 0)
                for name, parameter in layer.named_parameters():
                    parameter.data.copy_(weights[name])
                    self.parameters[index, name] = parameter

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        value: Any = rows[:, :-1]
        for _, layer in self.layers:
            value = layer(value)
        mask = torch.ones(rows[:, 1:].shape)
        return cross_entropy_loss(value, rows[:, 1:], mask, TensorParallel())

    def gradients(self, micro_batches: list[torch.Tensor]) -> tuple[float, Values]:
        """Return the mean loss, and clipped gradients in fp32."""
        losses = []
        for rows in micro_batches:
            loss = self.loss(rows)
            losses.append(loss.detach())
            (loss.float() / len(micro_batches) * SCALE).backward()  # adds up in fp16
        scaled = {key: parameter.grad.float() for key, parameter in self.parameters.items()}
        groups = [[one for one in scaled.values() if one.dim() == dims] for dims in (2, 1)]
        # In fp64 up to each group's sum, as DeepSpeed has it by now; v1.0 had fp32 throughout.
        squares = [sum((one.double() ** 2).sum() for one in group) for group in groups]
        norms = torch.stack([square.float() ** 0.5 for square in squares])
        clip = torch.linalg.vector_norm(norms) / SCALE + 1e-6
        assert clip > 1.0  # so clipping is part of what is compared
        factor = 1.0 / (clip * SCALE)
        mean = torch.stack(losses).mean()
        return float(mean), {key: gradient * factor for key, gradient in scaled.items()}

    def updated_by_torch(self, gradients: Values) -> Values:
        """Return the masters after a step of torch's AdamW."""
        result = {}
        for key, gradient in gradients.items():
            master, mean, square = (
                self.states.part(*key, kind, size=1, rank=0).clone()
                for kind in ("master", "exp_avg", "exp_avg_sq")
            )
            decay = DECAY if master.dim() == 2 else 0.0
            optimizer = torch.optim.AdamW(
                [master], lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=decay
            )
            count = torch.tensor(float(STEP - 1))
            optimizer.state[master] = {"step": count, "exp_avg": mean, "exp_avg_sq": square}
            master.grad = gradient
            optimizer.step()
            result[key] = master.detach()
        return result

    def updated(self, gradients: Values, dtype: torch.dtype) -> Values:
        """Return the masters after v1.0's Adam, computed in ``dtype``."""
        result = {}
        for key, gradient in gradients.items():
            master, mean, square = (
                self.states.part(*key, kind, size=1, rank=0).to(dtype)
                for kind in ("master", "exp_avg", "exp_avg_sq")
            )
            gradient = gradient.to(dtype)
            mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
            square = BETAS[1] * square + (1 - BETAS[1]) * gradient * gradient
            direction = (mean / (1 - BETAS[0] ** STEP)) / (
                (square / (1 - BETAS[1] ** STEP)).sqrt() + EPSILON
            )
            if master.dim() == 2:
                direction = direction + DECAY * master
            result[key] = master - RATE * direction
        return result


def test_it_is_the_plain_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron.data.tokenizers._CharLevelTokenizer.vocab_size", 250)
    recorded = unpack("tp1_dp2_zero1", tmp_path)
    loss, masters = step_of_ours(recorded, tmp_path)
    rows = torch.from_numpy(np.load(recorded / "data_tokens.npy").astype(np.int64))[20:24]
    reference = Reference(recorded)
    expected_loss, gradients = reference.gradients([rows[:2], rows[2:]])
    assert loss == expected_loss
    expected = reference.updated_by_torch(gradients)
    assert set(masters) == set(expected)
    for key, master in masters.items():
        assert torch.equal(master, expected[key]), key
    # Torch's Adam multiplies and divides in another order than v1.0's: the last bits differ.
    exact = reference.updated(gradients, torch.float64)
    plain = reference.updated(gradients, torch.float32)
    distances = [
        max(float((values[key] - exact[key]).abs().max()) for key in exact)
        for values in (masters, plain)
    ]
    equal = sum(int((masters[key] == plain[key]).sum()) for key in plain)
    total = sum(master.numel() for master in masters.values())
    print(f"{equal / total:.1%} of the masters are those of v1.0's order of operations")
    print("largest distance from the exact ones: ours {:.1e}, v1.0's {:.1e}".format(*distances))
    assert distances[0] < 1.5 * distances[1]
