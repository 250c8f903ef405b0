"""One rank of step_time.py: our trainer, and after each of its steps one of the plain loop's."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for use without an install

import deepspeed
import numpy as np
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from plain_neox import PlainShape, plain_layers, plain_loss

from megatron.cli.train import train
from megatron.config.run_config import RunConfig
from megatron.config.transport import load_transported
from megatron.engine.distributed import rank_environment


def main() -> None:
    """Train, measuring, and leave the times in $STEP_TIME_OUT/rankN.json."""
    config = load_transported()
    environment = rank_environment()
    turns = Turns(config)
    train(config, environment, on_loss=turns.take)
    path = Path(os.environ["STEP_TIME_OUT"], f"rank{environment.rank}.json")
    path.write_text(json.dumps({"ours": turns.ours, "plain": turns.plain}))


class Turns:
    """Called at the end of each of our steps: takes a plain one, and times both."""

    def __init__(self, config: RunConfig) -> None:
        self.ours: list[tuple[float, float]] = []  # wall and CPU seconds
        self.plain: list[tuple[float, float]] = []
        self._config = config
        self._began = (0.0, 0.0)
        self._plain_step: Callable[[], None] | None = None

    def take(self, loss: float) -> None:
        """Take a plain step after our step of ``loss``."""
        if self._plain_step is None:  # our engine stands: now the other one can be built
            self._plain_step = build_plain(self._config)
        else:
            self.ours.append(self._span())
        self._began = _now()
        self._plain_step()
        span = self._span()
        if self.ours:
            self.plain.append(span)
        self._began = _now()

    def _span(self) -> tuple[float, float]:
        torch.distributed.barrier()  # a step is over when it is over everywhere
        wall, cpu = _now()
        return wall - self._began[0], cpu - self._began[1]


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def build_plain(config: RunConfig) -> Callable[[], None]:
    """Return a function that takes one step of the plain loop."""
    topology, geometry, model = config.topology, config.geometry, config.model
    has_pipeline = topology.uses_pipeline_engine
    grid = PipeModelDataParallelTopology(
        num_pp=max(1, topology.pipeline_parallel_size),
        num_mp=topology.tensor_parallel_size,
        num_dp=topology.data_parallel_size,
    )
    group = None
    for ranks in grid.get_axis_comm_lists("model"):
        made = torch.distributed.new_group(ranks)
        group = made if torch.distributed.get_rank() in ranks else group
    shape = PlainShape(
        num_layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        seq_length=model.seq_length,
        vocabulary=2048,
        rotary_dims=int(model.hidden_size // model.num_attention_heads * model.rotary_pct),
        hidden_dropout=config.training.hidden_dropout,
        attention_dropout=config.training.attention_dropout,
        ranks=topology.tensor_parallel_size,
        group=group,
    )
    loss_function = plain_loss(shape)
    layers = plain_layers(shape)
    if has_pipeline:
        module = PipelineModule(
            [LayerSpec(layer, shape) for layer in layers],
            topology=grid,
            loss_fn=loss_function,
            partition_method="uniform",
        )
    else:
        module = torch.nn.Sequential(*(layer(shape) for layer in layers))
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(decay_groups(module), lr=1e-3, betas=(0.9, 0.95)),
        config={
            "train_batch_size": geometry.global_batch_size,
            "train_micro_batch_size_per_gpu": geometry.micro_batch_size,
            "gradient_accumulation_steps": geometry.gradient_accumulation_steps,
            "gradient_clipping": config.deepspeed.gradient_clipping,
            "zero_optimization": dict(config.deepspeed.zero_optimization),
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    batches = read_batches(
        Path(config.training.data_path + ".bin"), geometry.micro_batch_size, shape.seq_length
    )
    if has_pipeline:
        return lambda: engine.train_batch(batches)

    def step() -> None:
        for _ in range(geometry.gradient_accumulation_steps):
            inputs, labels = next(batches)
            engine.backward(loss_function(engine(inputs), labels))
            engine.step()

    return step


def decay_groups(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Return the usual two groups: matrices decay, biases and norms don't."""
    parameters = list(module.parameters())
    return [
        {"params": [each for each in parameters if each.dim() > 1], "weight_decay": 0.1},
        {"params": [each for each in parameters if each.dim() == 1], "weight_decay": 0.0},
    ]


def read_batches(path: Path, size: int, seq_length: int) -> Iterator[Any]:
    """Yield inputs and labels without end, rows one after the other in the file."""
    tokens = np.memmap(path, np.uint16, "r")
    per_batch = size * seq_length
    while True:
        for start in range(0, len(tokens) - per_batch - 1, per_batch):
            chunk = torch.from_numpy(tokens[start : start + per_batch + 1].astype(np.int64))
            yield chunk[:-1].view(size, seq_length), chunk[1:].view(size, seq_length)


if __name__ == "__main__":
    main()
