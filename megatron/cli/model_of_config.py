"""What a configuration says of the model, for training it and for looking at it."""

import torch

from megatron.config.run_config import RunConfig
from megatron.engine.distributed import ProcessGroups
from megatron.model.facts import ModelFacts
from megatron.model.parallel_layers import TensorParallel
from megatron.model.settings import ModelSettings

__all__ = ["DTYPES", "model_settings", "tensor_parallel_of"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bfloat16": torch.bfloat16}


def model_settings(config: RunConfig, facts: ModelFacts) -> ModelSettings:
    """Return the architecture.

    Raises:
        ConfigError: it isn't supported, contradicts itself or doesn't divide over the tensor ranks.
    """
    settings = ModelSettings.from_config(
        config.model, config.training, facts, neox_version=config.ledger.neox_version
    )
    settings.require_divisible(config.topology.tensor_parallel_size)
    return settings


def tensor_parallel_of(groups: ProcessGroups) -> TensorParallel:
    """Return this rank's place among those that share every layer."""
    if groups.topology.tensor_parallel_size == 1:
        return TensorParallel()
    return TensorParallel.of_group(groups.tensor)
