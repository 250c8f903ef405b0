"""What a run loads at its start, and how it saves."""

import contextlib
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from megatron.base.errors import CheckpointError, ConfigError, RunDirectoryError
from megatron.base.printing import print_rank_0
from megatron.checkpoint.load import LoadSettings, load_checkpoint, load_weights
from megatron.checkpoint.remote_copy import require_writable
from megatron.checkpoint.stored import StoredFacts, read_model_facts
from megatron.checkpoint.verified import verify_together
from megatron.cli.found_checkpoint import Source, Wish, needs_optimizer, wish_of
from megatron.cli.resume_plan import PlannedLaunch, plan_launch
from megatron.cli.run_check import RunCheck
from megatron.cli.run_saver import open_saver
from megatron.config.load import RunConfig
from megatron.data.tokenizers import padded_vocab_size
from megatron.engine.agreement import together
from megatron.engine.distributed import ProcessGroups
from megatron.engine.journal import Journal
from megatron.engine.saving import RunSaver
from megatron.engine.seeding import seed_resumed_run
from megatron.ledger.candidates import Candidate
from megatron.ledger.checkpoint_choice import choose
from megatron.ledger.lease import Lease
from megatron.ledger.readers import reading as reader_mark
from megatron.ledger.readers import remove_dead_marks
from megatron.ledger.run_directory import remove_leftovers
from megatron.ledger.shared_directory import answer_mark, leave_mark, remove_marks
from megatron.model.facts import ModelFacts
from megatron.model.settings import ModelSettings

__all__ = ["Checkpoints"]

_NAMED_NODES = 4  # in one message


@dataclass
class Checkpoints:
    """The checkpoint a launch goes on from (None: iteration 0) and the one it writes next."""

    config: RunConfig
    groups: ProcessGroups
    launch: PlannedLaunch
    lease: Lease | None  # on rank 0 of a run that saves
    _reading: contextlib.ExitStack  # rank 0's mark on a checkpoint that somebody else may delete

    @classmethod
    def open(cls, config: RunConfig, groups: ProcessGroups) -> "Checkpoints":
        """Take ``save`` for this job, find a good checkpoint and plan the launch.

        All ranks check the checkpoint. The plan is printed, or refused.

        Raises:
            MegatronError: on every rank: data, checkpoint and configuration don't fit, no
                checkpoint is good, or another job has ``save``.
        """
        save = Path(config.training.save) if config.training.save else None
        is_first = groups.rank == 0
        with contextlib.ExitStack() as on_failure:
            lease = together(groups, lambda: _take(save) if is_first and save else None)
            if lease is not None:
                on_failure.callback(lease.release)
            if save is not None:
                _require_shared(groups, save)
                together(groups, lambda: _try_copying(config, save) if is_first else None)
            wish: Wish = groups.from_rank_0(
                together(groups, lambda: wish_of(config) if is_first else None)
            )
            reading = on_failure.enter_context(contextlib.ExitStack())
            source = _find_good(groups, config, wish, reading)

            def plan() -> PlannedLaunch | None:
                return _printed_plan(config, source) if is_first else None

            launch = groups.from_rank_0(together(groups, plan))
            on_failure.pop_all()
        return cls(config, groups, launch, lease, reading)

    @property
    def source(self) -> Path | None:
        """The checkpoint that is loaded; None: the run starts at step 0."""
        return self.launch.source.checkpoint

    def close(self) -> None:
        """Give ``save`` back."""
        self._reading.close()
        if self.lease is not None:
            self.lease.release()

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
        facts = read_model_facts(self.source, gpt_j_residual=gpt_j_residual, is_verified=True).model
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
        with self._reading:
            return self._load_state(engine, settings, facts)

    def _load_state(self, engine: Any, settings: ModelSettings, facts: ModelFacts) -> int:
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

    def compare_forward_pass(self, check: RunCheck) -> None:
        """Compare the loaded model with what was loaded, if anything was."""
        if self.source is not None:
            check.compare(self.source, is_continued=not self.launch.source.finetune)

    def saver(
        self, engine: Any, facts: ModelFacts, journal: Journal | None, check: RunCheck | None = None
    ) -> RunSaver | None:
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
            lease=self.lease,
            more_state=dict if check is None else check.state,
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
            is_verified=True,
            adam_step=self.config.ledger.adam_step_on_load,
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


def _take(save: Path) -> Lease:
    """Become the only writer of ``save``; from then on nothing of a former one's appears there."""
    _make_directory(save)
    lease = Lease.acquire(save, tell=print_rank_0)
    try:
        lease.start_heartbeat()
        remove_leftovers(save)
        remove_marks(save)
        remove_dead_marks(save)
    except BaseException:
        lease.release()
        raise
    return lease


def _try_copying(config: RunConfig, save: Path) -> None:
    """Look at the start whether checkpoints can be copied; who goes on without is only warned."""
    if config.training.s3_path is None:
        return
    try:
        require_writable(config.training.s3_path, save.resolve().name)
    except CheckpointError as error:
        if config.ledger.on_save_error != "continue":
            raise
        print_rank_0(f"WARNING: {error}")


def _require_shared(groups: ProcessGroups, save: Path) -> None:
    """Refuse a ``save`` that isn't one and the same directory for all nodes. Collective.

    Raises:
        RunDirectoryError: on every rank; names the nodes.
    """
    token: str = groups.from_rank_0(uuid.uuid4().hex)
    together(groups, lambda: leave_mark(save, token) if groups.rank == 0 else None)
    problem = None
    if groups.local_rank == 0:
        problem = answer_mark(save, token, str(groups.rank))
        if problem is not None:
            problem = f"rank {groups.rank} on {socket.gethostname()} {problem}"
    problems = [one for one in groups.gather(problem) if one is not None]
    if groups.rank == 0:
        remove_marks(save)
    if problems:
        more = len(problems) - _NAMED_NODES
        error = RunDirectoryError(
            f"save: {save} must be one directory that every node reads and writes, but "
            + "; ".join(problems[:_NAMED_NODES])
            + (f"; and {more} more nodes" if more > 0 else "")
        )
        error.teller = 0
        raise error


def _find_good(
    groups: ProcessGroups, config: RunConfig, wish: Wish, reading: contextlib.ExitStack
) -> Source:
    """Return what is loaded: the first candidate whose bytes all ranks find good. Collective.

    Raises:
        CheckpointError: on every rank: there is none.
    """
    search = wish.search
    if search is None:
        return wish.chosen(None)
    on_rank_0 = search.candidates() if groups.rank == 0 else iter(())

    def next_candidate() -> Candidate | None:
        # An error of rank 0's is raised everywhere; the end is the same for all.
        return groups.from_rank_0(together(groups, lambda: next(on_rank_0, None)))

    def check(candidate: Candidate) -> str | None:
        checkpoint = search.path_of(candidate.step)
        reading.close()
        is_marked = groups.rank == 0 and not _is_own(checkpoint, config)
        together(
            groups, lambda: reading.enter_context(reader_mark(checkpoint)) if is_marked else None
        )
        problem = verify_together(
            checkpoint,
            groups.gather,
            rank=groups.rank,
            world_size=groups.topology.world_size,
            is_numbered=candidate.sequence is not None,
            needs_optimizer=needs_optimizer(config, wish),
        )
        if problem is not None:
            print_rank_0(f"NOT LOADED: {checkpoint}: {problem}")
        return problem

    try:
        chosen = choose(search, iter(next_candidate, None), check)
    except CheckpointError as error:
        error.teller = 0
        raise
    return wish.chosen(chosen)


def _is_own(checkpoint: Path, config: RunConfig) -> bool:
    """Whether only this job may delete it: it holds the lease."""
    save = config.training.save
    return save is not None and checkpoint.resolve().parent == Path(save).resolve()


def _printed_plan(config: RunConfig, source: Source) -> PlannedLaunch:
    launch = plan_launch(config, source)
    for line in launch.lines:
        print_rank_0(line)
    launch.plan.raise_if_refused()
    return launch


def _make_directory(save: Path) -> None:
    try:
        save.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"save: {save} cannot be made: {error.strerror}; name a directory this job may write"
        ) from error
