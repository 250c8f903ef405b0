"""Which checkpoint a launch goes on from, and what it tells resume planning. No torch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.base.errors import CheckpointError, ConfigError, MegatronError, RunDirectoryError
from megatron.base.torch_metadata import read_torch_metadata
from megatron.checkpoint.verified import problem_without_bytes
from megatron.cli.number_settings import number_settings
from megatron.cli.wanted_launch import (
    DescribedData,
    described_data,
    division_of,
    learning_rates,
    numerics_of,
    tokenizer_identity,
    without_effect_of,
)
from megatron.config.load import load_config
from megatron.config.run_config import RunConfig
from megatron.ledger.attempt_facts import (
    AttemptFacts,
    instructed_attempts,
    read_all_attempt_facts,
    read_attempt_facts,
)
from megatron.ledger.candidates import Candidate
from megatron.ledger.checkpoint_choice import Chosen, Search, choose, search_for
from megatron.ledger.checkpoint_evidence import committed_by
from megatron.ledger.instructions import Decision, InstructedAttempt, Instruction, decide
from megatron.ledger.ledger_file import Ledger, read_ledger
from megatron.ledger.planning.inputs import ForeignCheckpoint, Found, LearningRates
from megatron.ledger.run_directory import list_checkpoints, step_of
from megatron.optim.schedules import LearningRateSchedule

__all__ = ["Source", "Wish", "find_source", "found_checkpoint", "needs_optimizer", "wish_of"]

_SCHEDULE_STATE = ("start_lr", "warmup_iter", "decay_style", "end_iter", "min_lr")


@dataclasses.dataclass(frozen=True)
class Wish:
    """Where a launch looks for what it goes on from, and why there."""

    search: Search | None  # None: it starts at step 0
    instruction: Instruction | None  # what the configuration asks of one launch only
    decision: Decision
    finetune: bool = False  # only the weights are taken: a new run begins

    def chosen(self, chosen: Chosen | None) -> "Source":
        """Return what is loaded, once that is found."""
        return Source(
            checkpoint=None if chosen is None else chosen.checkpoint,
            instruction=self.instruction,
            decision=self.decision,
            finetune=self.finetune,
            roll_back="" if chosen is None else chosen.reason,
        )


@dataclasses.dataclass(frozen=True)
class Source:
    """The checkpoint a launch loads, and why."""

    checkpoint: Path | None  # None: it starts at step 0
    instruction: Instruction | None
    decision: Decision
    finetune: bool = False
    roll_back: str = ""  # why not the one that was looked for; empty if it is it

    @property
    def reason(self) -> str:
        """Say why this checkpoint, if there is something to say."""
        asked = self.decision.reason if self.instruction is not None else ""
        return "; ".join(part for part in (self.roll_back, asked) if part)


def wish_of(config: RunConfig) -> Wish:
    """Decide where a launch looks: where it was told to, or in its own run.

    Raises:
        CheckpointError: there is nothing to load, or starting would lose what is there.
        RunDirectoryError: an earlier attempt's facts cannot be read.
    """
    training = config.training
    load = Path(training.load) if training.load else None
    save = Path(training.save) if training.save else None
    iteration = config.other.iteration
    if save is None:
        search = search_for(load, None, iteration=iteration, finetune=training.finetune)
        decision = Decision(True, "nothing is saved, so the keys are obeyed as they are")
        return Wish(search, None, decision, training.finetune)
    instruction = Instruction.of(
        load=load, save=save, iteration=iteration, finetune=training.finetune
    )
    decision = decide(instruction, _instructed_attempts(save))
    if instruction is None or not decision.obeys:
        search = search_for(save, save, iteration=None, finetune=False)
        return Wish(search, instruction, decision)
    search = search_for(load, save, iteration=iteration, finetune=training.finetune)
    return Wish(search, instruction, decision, training.finetune)


def find_source(config: RunConfig) -> Source:
    """Return which checkpoint a launch would load, as far as can be told without reading tensors.

    Raises:
        CheckpointError: there is nothing to load, or nothing good.
        RunDirectoryError: an earlier attempt's facts cannot be read.
    """
    wish = wish_of(config)
    search = wish.search
    if search is None:
        return wish.chosen(None)

    def check(candidate: Candidate) -> str | None:
        return problem_without_bytes(
            search.path_of(candidate.step),
            is_numbered=candidate.sequence is not None,
            needs_optimizer=needs_optimizer(config, wish),
        )

    return wish.chosen(choose(search, search.candidates(), check))


def needs_optimizer(config: RunConfig, wish: Wish) -> bool:
    """Whether a launch restores more than weights."""
    return not (wish.finetune or config.training.no_load_optim)


def _instructed_attempts(save: Path) -> list[InstructedAttempt]:
    try:
        attempts = read_all_attempt_facts(save)
    except RunDirectoryError as error:
        raise RunDirectoryError(
            f"{error}. Put a copy of it back, or move it away to go on without what it tells"
        ) from error
    committed = committed_by(save, attempts)
    return [
        dataclasses.replace(one, committed_steps=committed[one.number])
        for one in instructed_attempts(attempts)
    ]


def found_checkpoint(config: RunConfig, source: Source) -> Found | None:
    """Read what planning needs to know of the checkpoint; None if there is none.

    Raises:
        CheckpointError: its ledger or metadata are damaged, or don't say what they must.
    """
    checkpoint = source.checkpoint
    if checkpoint is None:
        return None
    metadata = _metadata(checkpoint)
    ledger = read_ledger(checkpoint)
    record = ledger or _foreign(config, checkpoint, metadata)
    writer = None if ledger is None else _writer(ledger, checkpoint.parent)
    schedule = metadata.get("lr_scheduler")
    return Found(
        path=str(checkpoint),
        record=record,
        newest_step=_newest_step(config, checkpoint),
        reason=source.reason,
        learning_rates=_learning_rates(config, schedule),
        optimizer_steps=schedule.get("num_iters") if isinstance(schedule, Mapping) else None,
        numerics=None
        if writer is None
        else numerics_of(writer.topology, writer.geometry, writer.config, writer.environment),
        division=None if writer is None else division_of(writer.geometry),
        without_effect=None if writer is None else without_effect_of(writer.config),
        settings=None if writer is None else number_settings(writer.config),
        foreign_state=_foreign_state(metadata),
    )


def _newest_step(config: RunConfig, checkpoint: Path) -> int | None:
    """Return the newest checkpoint that a roll-back leaves behind; elsewhere nothing is."""
    save = config.training.save
    if save is None or checkpoint.parent.resolve() != Path(save).resolve():
        return None
    return max(list_checkpoints(checkpoint.parent), default=None)


def _metadata(checkpoint: Path) -> dict[str, Any]:
    """Return the plain values of the first metadata file; empty for weights alone."""
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if (checkpoint / name).exists():
            return read_torch_metadata(checkpoint / name)
    return {}


def _learning_rates(config: RunConfig, state: object) -> LearningRates | None:
    if not isinstance(state, Mapping) or not all(name in state for name in _SCHEDULE_STATE):
        return None
    schedule = LearningRateSchedule(
        **{name: state[name] for name in _SCHEDULE_STATE},
        version=config.ledger.neox_version,
        is_clamped=bool(config.lr_scheduler.use_checkpoint_lr_scheduler),
    )
    return learning_rates(schedule)


def _writer(ledger: Ledger, save: Path) -> AttemptFacts | None:
    """Return the facts of the attempt that wrote a checkpoint, if they are beside it."""
    if not ledger.spans:
        return None
    try:
        facts = read_attempt_facts(save, ledger.spans[-1].attempt)
    except RunDirectoryError:
        return None  # for verify to tell; a launch can do without
    return facts if facts is not None and facts.run_id == ledger.spans[-1].run_id else None


def _foreign_state(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    moments = metadata.get("moments")  # of tools/pythia.py import
    return (f"Adam's moments are {moments}",) if isinstance(moments, str) else ()


def _foreign(config: RunConfig, checkpoint: Path, metadata: Mapping[str, Any]) -> ForeignCheckpoint:
    step = metadata.get("iteration", metadata.get("total_iters", step_of(checkpoint.name)))
    if not isinstance(step, int):
        raise CheckpointError(f"{checkpoint} does not say at which step it was saved")
    assumed: list[str] = []
    assumed += [f"{one}, not the run's: numbers are not exact" for one in _foreign_state(metadata)]
    ranks = metadata.get("dp_world_size")
    if not isinstance(ranks, int):
        ranks = config.topology.data_parallel_size
        assumed.append(
            f"{ranks} data-parallel ranks, as this launch has: the checkpoint doesn't say how many "
            "it had"
        )
    then, data = _config_then(config, checkpoint, ranks * _model_ranks(metadata), assumed)
    batches = metadata.get("ds_config")
    batches = batches if isinstance(batches, Mapping) else {}
    return ForeignCheckpoint(
        step=step,
        micro_batch_size=batches.get(
            "train_micro_batch_size_per_gpu", then.geometry.micro_batch_size
        ),
        gradient_accumulation_steps=batches.get(
            "gradient_accumulation_steps", then.geometry.gradient_accumulation_steps
        ),
        data_parallel_size=ranks,
        eval_interval=then.training.eval_interval or None,
        eval_iters=then.training.eval_iters,
        orders=data.orders,
        datasets=data.datasets,
        tokenizer=tokenizer_identity(
            then.tokenizer.tokenizer_type, then.training.vocab_file, then.training.merge_file
        ),
        assumed=tuple(assumed),
    )


def _model_ranks(metadata: Mapping[str, Any]) -> int:
    """Return over how many ranks one copy of the model was divided."""
    ranks = metadata.get("mp_world_size", 1)
    return ranks if isinstance(ranks, int) else 1


def _config_then(
    config: RunConfig, checkpoint: Path, world_size: int, assumed: list[str]
) -> tuple[RunConfig, DescribedData]:
    """Return the configuration saved with a checkpoint, with its data where it lies now."""
    # A released checkpoint may have its configuration among its files.
    folder = checkpoint / "configs"
    files = sorted(
        path
        for path in (folder if folder.is_dir() else checkpoint).glob("*.y*ml")
        if path.is_file() and not path.is_symlink()  # a FIFO would be waited for
    )
    if not files:
        assumed.append("its data keys are this launch's: no configuration was saved with it")
        return config, described_data(config)
    paths = {name: value for name, value in _path_keys(config).items() if value}
    overrides = {"num_gpus": world_size}
    try:
        then = load_config(files, overrides, local_slots=lambda: world_size, environ={})
        return then, described_data(then)
    except (ConfigError, MegatronError) as error:
        problem = str(error).splitlines()[0]
    try:  # datasets and tokenizer may have moved: those named now have to be looked at
        then = load_config(
            files, {**overrides, **paths}, local_slots=lambda: world_size, environ={}
        )
        data = described_data(then)
    except (ConfigError, MegatronError):
        assumed.append(f"its data keys are this launch's: those saved with it fail ({problem})")
        return config, described_data(config)
    assumed.append(f"its data lies where this launch names it: {', '.join(sorted(paths))}")
    return then, data


def _path_keys(config: RunConfig) -> dict[str, Any]:
    names = ("data_path", "vocab_file", "merge_file")
    lists = (
        f"{split}{kind}_data_paths"
        for split in ("train", "valid", "test")
        for kind in ("", "_label")
    )
    flat = config.flat()
    return {name: flat[name] for name in (*names, *lists)}
