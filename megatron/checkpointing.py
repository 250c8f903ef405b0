"""NeoX's names for saving and loading, for scripts written for it.

The work is in ``megatron.checkpoint``.
"""

import logging
from pathlib import Path
from typing import Any

import torch.distributed

from megatron.base.errors import ConfigError
from megatron.checkpoint.agreement import all_or_none
from megatron.checkpoint.compatibility import MODEL_ARGUMENTS
from megatron.checkpoint.load import LoadSettings
from megatron.checkpoint.load import load_checkpoint as restore
from megatron.checkpoint.stored import read_model_facts
from megatron.checkpoint.verified import verify_together
from megatron.config.run_config import RunConfig
from megatron.ledger.candidates import Candidate
from megatron.ledger.checkpoint_choice import choose, search_for
from megatron.model.settings import ModelSettings
from megatron.neox_arguments import NeoXArgs
from megatron.training import prepared_training

__all__ = ["load_checkpoint", "save_checkpoint"]

logger = logging.getLogger(__name__)


def save_checkpoint(
    neox_args: NeoXArgs, iteration: int, model: Any, optimizer: Any, lr_scheduler: Any
) -> None:
    """Save ``model`` as the checkpoint of ``iteration`` in ``neox_args.save``.

    Args:
        neox_args: the configuration the model was set up with.
        iteration: steps trained so far.
        model: the engine of :func:`megatron.training.setup_model_and_optimizer`.
        optimizer: the engine's; saved with it.
        lr_scheduler: the engine's; saved with it.

    Raises:
        ConfigError: the model was set up without ``save``.
        CheckpointError: the checkpoint could not be completed.
    """
    saving = prepared_training(model).saving
    if saving is None:
        raise ConfigError("save is not set; name the directory that checkpoints go to")
    saving.save(iteration, False)
    saving.finish()


def load_checkpoint(
    neox_args: NeoXArgs,
    model: Any,
    optimizer: Any,
    lr_scheduler: Any,
    inference: bool = False,
    iteration: int | None = None,
) -> int:
    """Load into ``model`` what ``neox_args.load`` names and return its iteration, 0 if none is due.

    Args:
        neox_args: the configuration, with ``load``, ``finetune``, ``no_load_optim``, ….
        model: an engine of the same configuration.
        optimizer: the engine's; restored with it.
        lr_scheduler: the engine's; restored with it.
        inference: load the weights alone.
        iteration: load this step instead of the newest.

    Raises:
        CheckpointError: what was asked for cannot be loaded; never a silent start at 0.
    """
    config = neox_args.to_run_config()
    training = config.training
    is_weights_only = inference or training.finetune or training.no_load_optim
    source = _choose(config, iteration, needs_optimizer=not is_weights_only)
    if source is None:
        return 0
    state = restore(
        model,
        source,
        _load_settings(config, source),
        gather=_gather,
        restores_optimizer=not is_weights_only,
        restores_rng=not (inference or training.finetune or training.no_load_rng),
    )
    return 0 if training.finetune else state.iteration


def _choose(config: RunConfig, iteration: int | None, *, needs_optimizer: bool) -> Path | None:
    """Return the first candidate whose bytes all ranks find good; each rank looks for itself."""
    training = config.training
    search = all_or_none(
        lambda: search_for(
            Path(training.load) if training.load else None,
            Path(training.save) if training.save else None,
            iteration=config.other.iteration if iteration is None else iteration,
            finetune=training.finetune,
        ),
        _gather,
    )
    if search is None:
        return None
    candidates = all_or_none(lambda: list(search.candidates()), _gather)

    def check(candidate: Candidate) -> str | None:
        return verify_together(
            search.path_of(candidate.step),
            _gather,
            rank=torch.distributed.get_rank(),
            world_size=torch.distributed.get_world_size(),
            is_numbered=candidate.sequence is not None,
            needs_optimizer=needs_optimizer,
        )

    # Rank 0's list is everybody's: a file server may show others another state.
    chosen = choose(search, _gather(candidates)[0], check)
    if chosen.reason and torch.distributed.get_rank() == 0:
        logger.warning("%s: %s", chosen.checkpoint, chosen.reason)
    return chosen.checkpoint


def _load_settings(config: RunConfig, source: Path) -> LoadSettings:
    facts = read_model_facts(source, gpt_j_residual=config.model.gpt_j_residual).model
    current = {name: config.get(name) for name in MODEL_ARGUMENTS}
    return LoadSettings(
        model=ModelSettings.from_config(
            config.model, config.training, facts, neox_version=config.ledger.neox_version
        ),
        model_arguments=current | {"padded_vocab_size": facts.padded_vocab_size},
        topology=config.topology,
        rank=torch.distributed.get_rank(),
        is_verified=True,
    )


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
