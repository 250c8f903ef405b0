"""How a run saves: its keys, put together."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.base.printing import print_rank_0
from megatron.checkpoint.save_settings import SaveSettings
from megatron.checkpoint.saver import Saver
from megatron.checkpoint.stored import StoredFacts
from megatron.config.run_config import RunConfig
from megatron.engine.distributed import ProcessGroups
from megatron.engine.journal import Journal
from megatron.engine.saving import RunSaver
from megatron.engine.stop_signals import stop_signals
from megatron.ledger.lease import Lease

__all__ = ["open_saver"]


def open_saver(
    config: RunConfig,
    groups: ProcessGroups,
    engine: Any,
    journal: Journal,
    *,
    facts: StoredFacts,
    model_arguments: Mapping[str, Any],
    lease: Lease | None,
    more_state: Callable[[], dict[str, Any]] = dict,
) -> RunSaver:
    """Return what writes the checkpoints of a run that is saved.

    Args:
        config: of the run.
        groups: of this rank.
        engine: DeepSpeed's.
        journal: records the run.
        facts: what the run fixed about its model, and the size its files are written at.
        model_arguments: the eight values NeoX compares on load.
        lease: on rank 0, that on ``save``.
        more_state: more for this rank's model-states file, worked out right before a save.
    """
    training = config.training
    settings = SaveSettings(
        directory=Path(training.save),
        model_arguments=model_arguments,
        facts=facts,
        config_files=config.config_files,
        keep_last_n=training.keep_last_n_checkpoints,
        saves_rng=not training.no_save_rng,
        s3_path=training.s3_path,
        s3_chunk_size=training.s3_chunk_size,
    )
    saver = Saver(
        engine,
        settings,
        rank=groups.rank,
        world_size=groups.topology.world_size,
        gather=groups.gather,
        lease=lease,
        attempt=journal.attempt,
        parent=journal.previous_sequence,
        is_async=_is_async(config, engine),
    )
    return RunSaver(
        groups,
        saver,
        journal,
        goes_on_without=config.ledger.on_save_error == "continue",
        say=print_rank_0,
        signals=stop_signals(),
        more_state=more_state,
    )


def _is_async(config: RunConfig, engine: Any) -> bool:
    if config.ledger.async_save is False:
        return False
    if engine.zero_optimization_stage() >= 3:
        print_rank_0(
            "note: training waits for its checkpoints: the state of ZeRO stage 3 is not copied "
            "(async_save)"
        )
        return False
    return True
