"""Checkpoints without a ledger (NeoX's): what their files and configurations tell of the data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.base.errors import MegatronError
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.cli.resume_plan import look_at_data
from megatron.config.load import load_config
from megatron.config.run_config import RunConfig
from megatron.ledger.planning.inputs import ForeignCheckpoint

__all__ = ["adopt"]

_FILE_KEYS = (
    *("data_path", "train_data_paths", "valid_data_paths", "test_data_paths"),
    *("vocab_file", "merge_file"),
)


def adopt(config: RunConfig, source: Path) -> ForeignCheckpoint:
    """Return what a checkpoint without a ledger tells of the data it was trained on.

    Where it doesn't tell, this launch's configuration is taken, and the assumption is listed.

    Raises:
        CheckpointError: its files cannot be read.
        DatasetError: the data cannot be read.
    """
    stored = StoredCheckpoint(source)
    metadata = stored.model_states(0)
    assumed: list[str] = []
    writers = _writers_config(config, source, metadata, assumed) or config
    ds_config = metadata.get("ds_config") or {}
    facts = look_at_data(writers, finetune=False)
    return ForeignCheckpoint(
        step=stored.iteration,
        micro_batch_size=int(
            ds_config.get("train_micro_batch_size_per_gpu", writers.geometry.micro_batch_size)
        ),
        gradient_accumulation_steps=int(
            ds_config.get(
                "gradient_accumulation_steps", writers.geometry.gradient_accumulation_steps
            )
        ),
        data_parallel_size=int(metadata["dp_world_size"]),
        eval_interval=writers.training.eval_interval,
        eval_iters=writers.training.eval_iters,
        orders=facts.wanted.orders,
        datasets=facts.wanted.datasets,
        tokenizer=facts.wanted.tokenizer,
        assumed=tuple(assumed),
    )


def _writers_config(
    config: RunConfig, source: Path, metadata: Mapping[str, Any], assumed: list[str]
) -> RunConfig | None:
    """Return the configuration saved with the checkpoint, reading the data where it lies now."""
    saved = sorted((source / "configs").glob("*.yml"))
    if not saved:
        assumed.append(
            "no configuration is saved with the checkpoint: data, seed, batch and evaluations are "
            "taken from this launch's"
        )
        return None
    ranks = int(metadata["dp_world_size"]) * int(metadata["mp_world_size"])
    overrides: dict[str, Any] = {"global_num_gpus": ranks}
    for key in _FILE_KEYS:
        here = config.get(key)
        if here:
            overrides[key] = here
    try:
        writers = load_config(saved, overrides, local_slots=lambda: ranks, environ={})
    except MegatronError as error:
        assumed.append(
            f"the configuration saved with the checkpoint cannot be read ({error}): data, seed, "
            "batch and evaluations are taken from this launch's"
        )
        return None
    assumed.append("its datasets are those that this launch's configuration names")
    return writers
