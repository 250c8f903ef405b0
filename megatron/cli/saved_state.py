"""What a run loads at its start, and how it saves."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from megatron.base.errors import ConfigError, RunDirectoryError
from megatron.base.printing import print_rank_0
from megatron.checkpoint.load import LoadSettings, load_checkpoint, load_weights
from megatron.checkpoint.stored import StoredFacts, read_model_facts
from megatron.cli.resume_plan import PlannedLaunch, plan_launch
from megatron.cli.run_saver import open_saver
from megatron.config.load import RunConfig
from megatron.data.tokenizers import padded_vocab_size
from megatron.engine.agreement import together
from megatron.engine.distributed import ProcessGroups
from megatron.engine.journal import Journal
from megatron.engine.saving import RunSaver
from megatron.engine.seeding import seed_resumed_run
from megatron.ledger.run_directory import remove_leftovers
from megatron.ledger.save_lock import SaveLock
from megatron.model.facts import ModelFacts
from megatron.model.settings import ModelSettings

__all__ = ["Checkpoints"]


@dataclass
class Checkpoints:
    """The checkpoint a launch goes on from (None: iteration 0) and the one it writes next."""

    config: RunConfig
    groups: ProcessGroups
    launch: PlannedLaunch
    lock: SaveLock | None  # on rank 0 of a run that saves

    @classmethod
    def open(cls, config: RunConfig, groups: ProcessGroups) -> "Checkpoints":
        """Take ``save`` for this job and plan the launch; the plan is printed, or refused.

        Raises:
            MegatronError: on every rank, if data, checkpoint and configuration don't fit.
        """
        save = Path(config.training.save) if config.training.save else None

        def decide() -> tuple[PlannedLaunch | None, SaveLock | None]:
            if groups.rank != 0:
                return None, None
            lock = None
            if save is not None:
                _make_directory(save)
                lock = SaveLock.acquire(save, now=time.time())
            with contextlib.ExitStack() as on_failure:
                if lock is not None:
                    on_failure.callback(lock.release)
                if save is not None:
                    remove_leftovers(save)
                launch = plan_launch(config)
                for line in launch.lines:
                    print_rank_0(line)
                launch.plan.raise_if_refused()
                on_failure.pop_all()
            return launch, lock

        launch, lock = together(groups, decide)
        return cls(config, groups, groups.from_rank_0(launch), lock)

    @property
    def source(self) -> Path | None:
        """The checkpoint that is loaded; None: the run starts at step 0."""
        return self.launch.source.checkpoint

    def close(self) -> None:
        """Give ``save`` back."""
        if self.lock is not None:
            self.lock.release()

    @property
    def loads_weights_only(self) -> bool:
        """Whether optimizer and schedule start anew."""
        return self.launch.source.finetune or self.config.training.no_load_optim

    def facts(self, vocab_size: int) -> ModelFacts:
        """Return the pinned facts: the checkpoint's, or those of a new run.

        Raises:
            CheckpointError: the checkpoint doesn't tell.
            ConfigError: the key ``tp_bias_multiplicity`` says something else, or the tokenizer has
                more entries than the pinned vocabulary.
        """
        configured = self.config.ledger.tp_bias_multiplicity
        parallel = self.groups.topology.tensor_parallel_size
        gpt_j_residual = self.config.model.gpt_j_residual
        if self.source is None:
            return ModelFacts.of_new_run(
                padded_vocab_size=padded_vocab_size(
                    vocab_size, self.config.model.make_vocab_size_divisible_by, parallel
                ),
                tensor_parallel_size=parallel,
                gpt_j_residual=gpt_j_residual,
                configured_multiplicity=configured,
            )
        facts = read_model_facts(self.source, gpt_j_residual=gpt_j_residual).model
        if configured not in (None, facts.tp_bias_multiplicity):
            raise ConfigError(
                f"tp_bias_multiplicity={configured}, but {self.source} was trained with "
                f"{facts.tp_bias_multiplicity}; remove the key"
            )
        if vocab_size > facts.padded_vocab_size:
            raise ConfigError(
                f"the tokenizer has {vocab_size} entries, but the model in {self.source} has only "
                f"{facts.padded_vocab_size} (padded) rows; use the tokenizer it was trained with"
            )
        return facts

    def load_weights(self, module: nn.Module, settings: ModelSettings, facts: ModelFacts) -> None:
        """Fill ``module``, before an engine wraps it, if only the weights are wanted."""
        if self.source is not None and self.loads_weights_only:
            load_weights(
                module,
                self.source,
                self._load_settings(settings, facts),
                gather=self.groups.gather,
            )

    def load_state(self, engine: Any, settings: ModelSettings, facts: ModelFacts) -> int:
        """Restore what is wanted beside the weights; return the step the run goes on from."""
        training = self.config.training
        if self.source is None or self.launch.source.finetune:
            return 0
        state = load_checkpoint(
            engine,
            self.source,
            self._load_settings(settings, facts),
            gather=self.groups.gather,
            restores_weights=not self.loads_weights_only,
            restores_optimizer=not self.loads_weights_only,
            restores_rng=not training.no_load_rng,
        )
        print_rank_0(f"loaded {self.source}, iteration {state.iteration}")
        for notice in state.notices:
            print_rank_0(f"note: {notice}")
        if state.reseeds_rng:
            seed_resumed_run(self.groups, self.config.other.seed, step=state.iteration)
        return state.iteration

    def saver(self, engine: Any, facts: ModelFacts, journal: Journal | None) -> RunSaver | None:
        """Return what writes the run's checkpoints; None if it isn't saved."""
        if journal is None:
            return None
        return open_saver(
            self.config,
            self.groups,
            engine,
            journal,
            facts=self.stored_facts(facts),
            model_arguments=self._model_arguments(facts),
            lease=self.lock,
        )

    def stored_facts(self, facts: ModelFacts) -> StoredFacts:
        """Return the pinned facts together with the size this run's files are written at."""
        return StoredFacts(facts, self.groups.topology.tensor_parallel_size)

    def _load_settings(self, settings: ModelSettings, facts: ModelFacts) -> LoadSettings:
        return LoadSettings(
            model=settings,
            model_arguments=self._model_arguments(facts),
            topology=self.groups.topology,
            rank=self.groups.rank,
        )

    def _model_arguments(self, facts: ModelFacts) -> dict[str, Any]:
        model = self.config.model
        return {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "max_position_embeddings": model.max_position_embeddings,
            "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
            "padded_vocab_size": facts.padded_vocab_size,
            "tokenizer_type": self.config.tokenizer.tokenizer_type,
            "model_parallel_size": self.groups.topology.tensor_parallel_size,
        }


def _make_directory(save: Path) -> None:
    try:
        save.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"save: {save} cannot be made: {error.strerror}; name a directory this job may write"
        ) from error
