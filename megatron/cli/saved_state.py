"""What a run loads at its start, and how it saves."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from megatron.config.load import RunConfig
from megatron.data.tokenizers import padded_vocab_size
from megatron.engine.agreement import together
from megatron.engine.distributed import ProcessGroups
from megatron.ledger.attempts import AttemptLog
from megatron.ledger.run_directory import choose_checkpoint
from megatron.ledger.save_lock import SaveLock
from megatron.model.facts import ModelFacts
from megatron.model.parallel_layers import TensorParallel
from megatron.model.settings import ModelSettings

__all__ = ["Checkpoints"]


@dataclass
class Checkpoints:
    """The checkpoint a launch goes on from (None: iteration 0) and the one it writes next."""

    config: RunConfig
    groups: ProcessGroups
    source: Path | None
    lock: SaveLock | None  # on rank 0 of a run that saves

    @classmethod
    def open(cls, config: RunConfig, groups: ProcessGroups) -> "Checkpoints":
        """Take ``save`` for this job and decide what is loaded; every rank gets the same answer."""
        training = config.training
        load = Path(training.load) if training.load else None
        save = Path(training.save) if training.save else None

        def decide() -> tuple[Path | None, SaveLock | None]:
            if groups.rank != 0:
                return None, None
            lock = None
            if save is not None:
                save.mkdir(parents=True, exist_ok=True)
                lock = SaveLock.acquire(save)
            source = choose_checkpoint(
                load, save, iteration=config.other.iteration, finetune=training.finetune
            )
            return source, lock

        source, lock = together(groups, decide)
        return cls(config, groups, groups.from_rank_0(source), lock)

    def close(self) -> None:
        """Give ``save`` back."""
        if self.lock is not None:
            self.lock.release()

    @property
    def loads_weights_only(self) -> bool:
        """Whether optimizer and schedule start anew."""
        return self.config.training.finetune or self.config.training.no_load_optim

    def facts(self, vocab_size: int) -> ModelFacts:
        """Return the pinned facts: the checkpoint's, or those of a new run."""
        if self.source is None:
            parallel = self.groups.topology.tensor_parallel_size
            return ModelFacts.of_new_run(
                padded_vocab_size=padded_vocab_size(
                    vocab_size, self.config.model.make_vocab_size_divisible_by, parallel
                ),
                tensor_parallel_size=parallel,
                gpt_j_residual=self.config.model.gpt_j_residual,
                configured_multiplicity=self.config.ledger.tp_bias_multiplicity,
            )
        raise NotImplementedError

    def load_weights(
        self, module: nn.Module, settings: ModelSettings, tensor_parallel: TensorParallel
    ) -> None:
        """Fill ``module``, before an engine wraps it, if only the weights are wanted."""

    def load_state(self, engine: Any, facts: ModelFacts) -> int:
        """Restore optimizer, schedule and random state; return the step the run goes on from."""
        return 0

    def saver(
        self, engine: Any, facts: ModelFacts, log: AttemptLog | None
    ) -> Callable[[int], None] | None:
        """Return how a step's checkpoint is written; None if the run isn't saved."""
        return None
