"""Writing a checkpoint in NeoX's layout.

    1  every rank writes its files into .tmp-global_stepN-…, through DeepSpeed, and syncs them
    2  all ranks agree that every file is written
    3  rank 0 adds configs/ and ledger.json, and names the directory global_stepN
    4  rank 0 points `latest` at it, then deletes what keep_last_n allows

A directory called global_stepN is therefore always complete, and a failure on any rank is raised on
all of them while `latest` still names the checkpoint before.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
)

from megatron.base.atomic_files import fsync_directory, write_atomically
from megatron.base.errors import CheckpointError
from megatron.checkpoint.agreement import Gather, all_or_none, require_agreement
from megatron.checkpoint.optimizer_state import with_fused_adam_keys
from megatron.checkpoint.rng import capture_rng_states
from megatron.checkpoint.safe_torch import read_torch_file
from megatron.checkpoint.stored import LEDGER_FILE, StoredFacts
from megatron.ledger.ledger_file import Ledger, ModelPart, write_ledger
from megatron.ledger.run_directory import (
    commit_checkpoint,
    delete_old_checkpoints,
    temporary_name,
    write_latest,
)

__all__ = ["SaveSettings", "model_part", "save_checkpoint"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveSettings:
    """What every checkpoint of a run has in common."""

    directory: Path  # NeoX's `save`
    model_arguments: Mapping[str, Any]  # the eight values NeoX compares on load, its `args`
    facts: StoredFacts
    config_files: Mapping[str, str]  # name -> text, kept in configs/
    keep_last_n: int | None = None
    saves_rng: bool = True


def save_checkpoint(
    engine: Any,
    iteration: int,
    settings: SaveSettings,
    *,
    rank: int,
    gather: Gather,
    ledger: Ledger | None = None,
) -> Path:
    """Save ``engine`` as the checkpoint of ``iteration`` and return its directory.

    Every rank calls it. ``latest`` changes last.

    Args:
        engine: DeepSpeed's.
        iteration: steps trained so far.
        settings: of the run.
        rank: global rank of this process.
        gather: collects a value of every rank, outside of the training's process groups.
        ledger: the lineage up to this checkpoint, on rank 0; without one, ``ledger.json`` holds
            the pinned facts of the model alone.

    Raises:
        CheckpointError: the checkpoint could not be completed; names the rank that failed. It
            leaves nothing visible behind.
    """
    temporary = _begin(settings.directory, iteration, rank, gather)
    try:
        client_state: dict[str, Any] = {
            "sparse_tensor_module_names": set(),  # NeoX's DeepSpeed has it, the newer one doesn't
            "iteration": iteration,
            "args": dict(settings.model_arguments),
        }
        if settings.saves_rng:
            client_state.update(capture_rng_states())
        writer = _FileWriter()
        with _checkpoint_engine(engine, writer):
            engine.save_checkpoint(
                str(settings.directory),
                tag=temporary.name,
                client_state=client_state,
                save_latest=False,
            )
        require_agreement(writer.problem, gather)
        return all_or_none(lambda: _complete(temporary, iteration, settings, rank, ledger), gather)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _begin(directory: Path, iteration: int, rank: int, gather: Gather) -> Path:
    name = gather(temporary_name(iteration) if rank == 0 else None)[0]
    temporary = directory / name

    def create() -> Path:
        if rank == 0:
            temporary.mkdir(parents=True)
        return temporary

    return all_or_none(create, gather)


def _complete(
    temporary: Path, iteration: int, settings: SaveSettings, rank: int, ledger: Ledger | None
) -> Path:
    if rank != 0:
        return settings.directory / f"global_step{iteration}"
    if settings.config_files:
        configs = temporary / "configs"
        configs.mkdir()
        for name, text in settings.config_files.items():
            write_atomically(configs / Path(name).name, text)
    if ledger is not None:
        write_ledger(temporary, ledger)
    else:
        facts = {"model": asdict(model_part(settings.facts))}
        write_atomically(temporary / LEDGER_FILE, json.dumps(facts, indent=2) + "\n")
    final = commit_checkpoint(temporary, iteration)
    write_latest(settings.directory, iteration)
    if settings.keep_last_n is not None:
        try:
            delete_old_checkpoints(settings.directory, settings.keep_last_n)
        except OSError as error:
            # The new checkpoint stands; only disk space is at stake.
            logger.warning("old checkpoints could not be deleted (keep_last_n): %s", error)
    return final


def model_part(facts: StoredFacts) -> ModelPart:
    """Return the part ``model`` of a ledger: what the first checkpoint of a run pins."""
    return ModelPart(
        padded_vocab_size=facts.model.padded_vocab_size,
        tp_bias_multiplicity=facts.model.tp_bias_multiplicity,
        tensor_parallel_size=facts.tensor_parallel_size,
    )


@contextlib.contextmanager
def _checkpoint_engine(engine: Any, replacement: CheckpointEngine) -> Iterator[None]:
    original = engine.checkpoint_engine
    engine.checkpoint_engine = replacement
    try:
        yield
    finally:
        engine.checkpoint_engine = original


class _FileWriter(CheckpointEngine):
    """Writes DeepSpeed's files. A failure is kept for later instead of raised: the other ranks are
    on their way into DeepSpeed's barrier, where they would wait for this one until a timeout.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "synced files"
        self.problem: str | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare."""

    def save(self, state_dict: Any, path: str) -> None:
        try:
            torch.save(_as_neox_reads_it(state_dict), path)
            _sync(path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self.problem = f"{path} could not be written: {error}"

    def load(self, path: str, map_location: Any = None) -> Any:
        return read_torch_file(Path(path))

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return self.problem is None


def _as_neox_reads_it(content: Any) -> Any:
    """Return a file's content with FusedAdam's keys, and without megatron-core's empty entries."""
    if not isinstance(content, Mapping):
        return content
    if "optimizer_state_dict" in content and "ds_config" in content:
        zero = dict(content["optimizer_state_dict"])
        if isinstance(zero.get("base_optimizer_state"), Mapping):
            zero["base_optimizer_state"] = with_fused_adam_keys(zero["base_optimizer_state"])
        return {**content, "optimizer_state_dict": zero}
    optimizer = content.get("optimizer")
    if isinstance(optimizer, Mapping):
        if "param_groups" in optimizer:
            return {**content, "optimizer": with_fused_adam_keys(optimizer)}
        inner = optimizer.get("optimizer_state_dict", optimizer.get("base_optimizer_state"))
        if isinstance(inner, Mapping) and "param_groups" in inner:
            name = next(key for key, value in optimizer.items() if value is inner)
            adapted = {**optimizer, name: with_fused_adam_keys(inner)}
            return {**content, "optimizer": adapted}
    return content


def _sync(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    fsync_directory(Path(path).parent)
