"""Writing one checkpoint in NeoX's layout, and waiting for it; ``saver`` does the work."""

from pathlib import Path
from typing import Any

from megatron.checkpoint.agreement import Gather
from megatron.checkpoint.save_settings import SaveSettings
from megatron.checkpoint.saver import Saver
from megatron.ledger.ledger_file import Ledger
from megatron.ledger.run_directory import checkpoint_path

__all__ = ["save_checkpoint"]


def save_checkpoint(
    engine: Any,
    iteration: int,
    settings: SaveSettings,
    *,
    rank: int,
    world_size: int,
    gather: Gather,
    ledger: Ledger | None = None,
    parent: int | None = None,
) -> Path:
    """Save ``engine`` as the checkpoint of ``iteration`` and return its directory.

    Every rank calls it. ``latest`` changes last.

    Args:
        engine: DeepSpeed's.
        iteration: steps trained so far.
        settings: of the run.
        rank: global rank of this process.
        world_size: number of ranks.
        gather: collects a value of every rank, outside of the training's process groups.
        ledger: the lineage up to this checkpoint, on rank 0; without one, ``ledger.json`` holds
            the pinned facts of the model alone.
        parent: commit sequence of the lineage's checkpoint before it in the directory, on rank 0.

    Raises:
        CheckpointError: the checkpoint could not be completed; names the rank that failed. It
            leaves nothing visible behind.
    """
    saver = Saver(
        engine,
        settings,
        rank=rank,
        world_size=world_size,
        gather=gather,
        parent=parent,
        is_async=False,
    )
    saver.save(iteration, ledger)
    return checkpoint_path(settings.directory, iteration)
