"""The model that NeoX configuration files describe, whatever they say of machines and batches."""

from collections.abc import Sequence
from pathlib import Path

from megatron.base.errors import CheckpointError
from megatron.checkpoint.stored import read_model_facts
from megatron.config.load import load_config
from megatron.config.run_config import RunConfig
from megatron.model.settings import ModelSettings

__all__ = ["load_model_config", "stored_model"]

# Their values are the writer's business and may not even fit each other on one machine.
_ONE_PROCESS = {
    "num_gpus": 1,
    "global_num_gpus": None,
    "hostfile": None,
    "model_parallel_size": 1,
    "pipe_parallel_size": 1,
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "elastic_batch": False,
}


def load_model_config(files: Sequence[Path]) -> RunConfig:
    """Read NeoX configuration files for their model, tokenizer and training groups alone.

    Raises:
        ConfigError: they cannot be used.
    """
    return load_config(files, _ONE_PROCESS, local_slots=lambda: 1, environ={})


def stored_model(
    checkpoint: Path, config_files: Sequence[Path] = ()
) -> tuple[RunConfig, ModelSettings]:
    """Return a checkpoint's configuration, and its model with the pinned facts.

    Args:
        checkpoint: a directory with layer files or a sequential module.
        config_files: read instead of its ``configs/*.yml``, or of the ``*.yml`` beside its files
            (released Pythia).

    Raises:
        CheckpointError: it holds no configuration.
        ConfigError: the configuration cannot be used.
    """
    files = (
        list(config_files)
        or sorted((checkpoint / "configs").glob("*.y*ml"))
        or sorted(checkpoint.glob("*.y*ml"))
    )
    if not files:
        raise CheckpointError(
            f"{checkpoint} holds no configs/*.yml, and its tensors alone don't say how they are "
            "divided; name the run's configuration files: --config"
        )
    config = load_model_config(files)
    facts = read_model_facts(checkpoint, gpt_j_residual=config.model.gpt_j_residual).model
    version = config.ledger.neox_version
    return config, ModelSettings.from_config(
        config.model, config.training, facts, neox_version=version
    )
