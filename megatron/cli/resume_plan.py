"""From a configuration and a save directory to the plan of a launch; the same for ranks and tools.

No torch here: `neox-ledger explain` runs it on a login node.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import CheckpointError, ConfigError, DatasetError
from megatron.config.run_config import RunConfig
from megatron.data.tokenizers import build_tokenizer
from megatron.ledger.attempt_facts import instructed_attempts, read_all_attempt_facts
from megatron.ledger.instructions import Instruction, decide
from megatron.ledger.ledger_file import DatasetNote, Ledger, TokenizerIdentity, read_ledger
from megatron.ledger.planning.costs import Counting
from megatron.ledger.planning.inputs import (
    ForeignCheckpoint,
    Found,
    LearningRates,
    OpenOrder,
    Wanted,
)
from megatron.ledger.planning.plan import plan_resume
from megatron.ledger.planning.resume_plan import ResumePlan
from megatron.ledger.run_directory import choose_checkpoint, list_checkpoints
from megatron.optim.schedules import ScheduleSettings
from megatron.stream.descriptions import describe_streams, map_names, open_order_alone
from megatron.stream.index_maps import count_tokens
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.opening import MapName
from megatron.stream.order_description import OrderDescription
from megatron.stream.orders import TokenSpans
from megatron.stream.sample_counts import requested_samples, train_iters_for_epochs
from megatron.stream.sample_stream import Stream
from megatron.stream.stream_settings import (
    DatasetFiles,
    StreamSettings,
    dataset_files,
    identify_datasets,
)

__all__ = ["DataFacts", "Start", "choose_start", "look_at_data", "plan_launch", "stream_settings"]


@dataclass(frozen=True)
class Start:
    """Which checkpoint a launch loads, and what it was asked."""

    source: Path | None  # None: step 0
    instruction: Instruction | None
    obeys: bool  # False: an instruction that was obeyed before; the run continues
    reason: str
    finetune: bool  # a new run from the weights
    newest_step: int | None = None  # of the run in `save`

    @property
    def ledger(self) -> Ledger | None:
        """The ledger of the checkpoint; None if there is no checkpoint, or none of ours."""
        return None if self.source is None else read_ledger(self.source)


def choose_start(config: RunConfig) -> Start:
    """Decide what is loaded (design §5, 'The same command again').

    Raises:
        CheckpointError: what was asked for is not there, or would lose what is.
    """
    training = config.training
    load = Path(training.load) if training.load else None
    save = Path(training.save) if training.save else None
    iteration, finetune = config.other.iteration, training.finetune
    instruction, obeys, reason = None, False, ""
    if save is not None:
        instruction = Instruction.of(load=load, save=save, iteration=iteration, finetune=finetune)
        decision = decide(instruction, instructed_attempts(read_all_attempt_facts(save)))
        obeys, reason = decision.obeys, decision.reason
        if instruction is not None and not obeys:
            load, iteration, finetune = save, None, False
    source = choose_checkpoint(load, save, iteration=iteration, finetune=finetune)
    saved = list_checkpoints(save) if save is not None else []
    return Start(
        source=source,
        instruction=instruction,
        obeys=obeys,
        reason=reason if instruction is not None else "",
        finetune=finetune,
        newest_step=saved[-1] if saved else None,
    )


@dataclass(frozen=True)
class DataFacts:
    """What planning and training need to know of data and tokenizer."""

    wanted: Wanted
    vocab_size: int  # entries of the tokenizer, before padding
    eod: int | None
    map_names: Mapping[str, Mapping[str, MapName]]  # split -> component key -> NeoX's cache name


def stream_settings(config: RunConfig) -> StreamSettings:
    """Read the data keys from the groups they stand in; lists become tuples."""
    flat = config.flat()
    names = [field.name for field in fields(StreamSettings)]
    values = {name: flat[name] for name in names if flat.get(name) is not None}
    return StreamSettings(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    )


def look_at_data(config: RunConfig, *, finetune: bool) -> DataFacts:
    """Open tokenizer and datasets and say what the configuration asks for.

    Raises:
        ConfigError: keys that contradict each other or the data.
        DatasetError: a dataset cannot be read.
    """
    training = config.training
    tokenizer = build_tokenizer(
        config.tokenizer.tokenizer_type,
        vocab_file=training.vocab_file,
        merge_file=training.merge_file,
    )
    if config.other.eod_mask_loss and tokenizer.eod is None:
        raise ConfigError(
            "eod_mask_loss: true needs an end-of-document token, but the tokenizer "
            f"{training.vocab_file} has no <|endoftext|>"
        )
    settings = stream_settings(config)
    identities = identify_datasets(settings)
    batch = config.geometry.global_batch_size
    requested = requested_samples(
        train_iters=training.train_iters,
        train_batch_size=batch,
        eval_interval=training.eval_interval or (training.train_iters or 0) + 1,
        eval_iters=training.eval_iters,
    )
    orders = describe_streams(settings, requested, identities)
    if orders["train"] is None:
        raise ConfigError(
            f"there is no training data: the train share of split={training.split!r} is no "
            f"document of {training.data_path}. Give train a larger share, or a larger dataset"
        )
    epoch_samples = _epoch_samples(settings, orders["train"])
    train_iters = training.train_iters
    if train_iters is None:
        train_iters = train_iters_for_epochs(
            training.train_epochs, list(epoch_samples.values()), batch
        )
        if train_iters < 1:
            raise ConfigError(
                f"train_epochs={training.train_epochs}: the training data ends before the first "
                f"step, which takes {batch} samples (train_batch_size); one epoch has "
                f"{sum(epoch_samples.values())}"
            )
    wanted = Wanted(
        orders=orders,
        datasets={
            identity.digest: DatasetNote(
                path=str(Path(files.prefix).resolve()),
                level=identity.level,
                num_documents=identity.num_documents,
                num_tokens=identity.num_tokens,
                companions={role: str(Path(path).resolve()) for role, path in files.companions},
            )
            for files, identity in identities.items()
        },
        train_batch_size=batch,
        gradient_accumulation_steps=config.geometry.gradient_accumulation_steps,
        train_iters=train_iters,
        eval_interval=training.eval_interval,
        eval_iters=training.eval_iters,
        tokenizer=_tokenizer_identity(config),
        accept_data_change=frozenset(config.ledger.accept_data_change),
        finetune=finetune,
        restores_optimizer=not training.no_load_optim,
        restores_random_state=not training.no_load_rng,
        is_recorded=training.save is not None,
        learning_rates=_learning_rates(config, train_iters),
        schedule_choice=_schedule_choice(config),
        numerics=numeric_facts(config),
        without_effect={"train_iters": train_iters, "num_workers": training.num_workers},
        train_epochs=training.train_epochs,
        epoch_samples=epoch_samples if training.train_epochs is not None else {},
    )
    return DataFacts(
        wanted,
        tokenizer.vocab_size,
        tokenizer.eod,
        map_names(settings, requested, identities),
    )


def plan_launch(
    facts: DataFacts,
    start: Start,
    foreign: ForeignCheckpoint | None = None,
    *,
    counts_neox: bool = False,
    is_unlimited: bool = False,
) -> ResumePlan:
    """Plan a launch.

    Args:
        facts: what the configuration asks for.
        start: what is loaded.
        foreign: what a checkpoint without a ledger tells; not needed to begin a new run from it.
        counts_neox: also count what NeoX would repeat and skip.
        is_unlimited: count however many samples there are.

    Raises:
        CheckpointError: the checkpoint has no ledger, and ``foreign`` isn't given.
    """
    record = start.ledger or foreign
    if start.source is None or (record is None and start.finetune):
        return plan_resume(facts.wanted, None)
    if record is None:
        raise CheckpointError(f"{start.source} has no ledger: it was not saved by this trainer")
    counting = Counting(
        open_order=_order_opener(facts), counts_neox=counts_neox, is_unlimited=is_unlimited
    )
    found = Found(
        path=str(start.source),
        record=record,
        newest_step=start.newest_step,
        reason=start.reason,
    )
    return plan_resume(facts.wanted, found, counting)


def _order_opener(facts: DataFacts) -> OpenOrder:
    """Open orders for counting, where the datasets that are configured now hold their content."""

    def open_source(description: OrderDescription) -> Any:
        def locate(dataset: str) -> DatasetFiles:
            note = facts.wanted.datasets.get(dataset)
            if note is None:
                raise DatasetError(f"the content named {dataset} is not among the datasets here")
            return DatasetFiles(note.path, note.companions.get("label"))

        return _CountedOrder(open_order_alone(description, locate))

    return open_source


class _CountedOrder:
    """A stream of one component, as counting asks for it."""

    def __init__(self, stream: Stream) -> None:
        self._order = stream.orders[0]

    @property
    def head_length(self) -> int:
        """Positions before tail block 1."""
        return self._order.head_length

    def spans(self, positions: NDArray[np.int64]) -> TokenSpans:
        """Return what the samples at ``positions`` are made of."""
        return self._order.spans(*self._order.locate(positions))


def numeric_facts(config: RunConfig) -> dict[str, str | int | float]:
    """Return what changes rounding and nothing else, for the plan's comparison."""
    topology = config.topology
    return {
        "pipe_parallel_size": topology.pipeline_parallel_size,
        "model_parallel_size": topology.tensor_parallel_size,
        "data-parallel size": topology.data_parallel_size,
        "micro batch": config.geometry.micro_batch_size,
    }


def _epoch_samples(settings: StreamSettings, order: Any) -> dict[str, int]:
    prefixes = {files.prefix: files for files in _all_files(settings)}
    sizes = {prefix: IndexedDataset(prefix).sizes for prefix in prefixes}
    group = dataset_files(settings)["train"]
    samples = {}
    for number, component in enumerate(order.components):
        prefix = group[number].prefix if len(group) > 1 else group[0].prefix
        tokens = count_tokens(sizes[prefix], component.documents)
        samples[component.key] = (tokens - 1) // settings.seq_length
    return samples


def _all_files(settings: StreamSettings) -> set[DatasetFiles]:
    return {files for group in dataset_files(settings).values() for files in group}


def _tokenizer_identity(config: RunConfig) -> TokenizerIdentity:
    paths = (config.training.vocab_file, config.training.merge_file)
    digests = [
        hashlib.sha256(Path(path).read_bytes()).hexdigest()
        for path in paths
        if path is not None and Path(path).is_file()
    ]
    return TokenizerIdentity(type=config.tokenizer.tokenizer_type, files=tuple(digests))


def _schedule_settings(config: RunConfig, train_iters: int) -> ScheduleSettings:
    return ScheduleSettings.from_config(
        config.lr_scheduler,
        config.optimizer,
        replace(config.training, train_iters=train_iters),
        neox_version=config.ledger.neox_version,
    )


def _learning_rates(config: RunConfig, train_iters: int) -> LearningRates:
    schedule = _schedule_settings(config, train_iters).schedule()
    return LearningRates(
        values={
            "start_lr": schedule.start_lr,
            "warmup_iter": schedule.warmup_iter,
            "decay_style": schedule.decay_style,
            "end_iter": schedule.end_iter,
            "min_lr": schedule.min_lr,
        },
        at=schedule.at,
    )


def _schedule_choice(config: RunConfig) -> Any:
    if config.lr_scheduler.override_lr_scheduler:
        return "configured"
    return "checkpoint" if config.lr_scheduler.use_checkpoint_lr_scheduler else "refuse"
