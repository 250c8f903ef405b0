"""Who reports a run, and where to."""

import os
from typing import Any

from megatron.config.load import RunConfig
from megatron.engine.distributed import ProcessGroups
from megatron.engine.reports import MetricWriter, Reporter, TensorBoardWriter, WandbWriter
from megatron.engine.throughput import ModelShape, flops_per_step
from megatron.model.facts import ModelFacts

__all__ = ["build_reporter"]


def build_reporter(
    config: RunConfig, groups: ProcessGroups, facts: ModelFacts, train_iters: int
) -> Reporter:
    """Return the reporter of this rank; only global rank 0's says anything."""
    shape = ModelShape(
        num_layers=config.model.num_layers,
        hidden_size=config.model.hidden_size,
        seq_length=config.model.seq_length,
        padded_vocab_size=facts.padded_vocab_size,
    )
    batch = config.geometry.global_batch_size
    recomputes = config.training.checkpoint_activations
    is_silent = groups.rank != 0
    return Reporter(
        train_iters=train_iters,
        log_interval=config.logging.log_interval,
        flops_per_step=flops_per_step(shape, batch, recomputes=recomputes),
        flops_per_step_without_recompute=flops_per_step(shape, batch, recomputes=False),
        world_size=groups.topology.world_size,
        tokens_per_sample=config.model.seq_length,
        peak_tflops=config.logging.peak_theoretical_tflops,
        writers=() if is_silent else _writers(config),
        is_silent=is_silent,
    )


def _writers(config: RunConfig) -> list[MetricWriter]:
    logging = config.logging
    writers: list[MetricWriter] = []
    if logging.tensorboard_dir:
        writers.append(TensorBoardWriter(logging.tensorboard_dir, config.flat()))
    if _wandb_is_wanted(logging):
        writers.append(
            WandbWriter(
                config.flat(),
                project=logging.wandb_project,
                group=logging.wandb_group,
                name=logging.wandb_run_name,
                entity=logging.wandb_team,
            )
        )
    return writers


def _wandb_is_wanted(logging: Any) -> bool:
    """Like NeoX: unless switched off, W&B runs wherever there is a key (or no need of one)."""
    if logging.use_wandb is False:
        return False
    if os.environ.get("WANDB_MODE") == "disabled":
        return False
    if os.environ.get("WANDB_MODE") == "offline":
        return bool(logging.use_wandb)
    return any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_LOCAL")) or bool(
        logging.use_wandb
    )
