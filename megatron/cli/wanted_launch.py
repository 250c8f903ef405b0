"""What a configuration asks for, as resume planning sees it. No torch: the launcher asks too."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from megatron.base.errors import ConfigError
from megatron.cli.number_settings import number_settings
from megatron.config.batch_geometry import BatchGeometry
from megatron.config.run_config import RunConfig
from megatron.config.topology import Topology
from megatron.ledger.ledger_file import DatasetNote, TokenizerIdentity
from megatron.ledger.planning.inputs import LearningRates, StreamName, Wanted
from megatron.optim.schedules import LearningRateSchedule, ScheduleSettings
from megatron.stream.descriptions import describe_streams, epoch_samples
from megatron.stream.identity import DatasetIdentity
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.order_description import OrderDescription
from megatron.stream.sample_counts import SplitCounts, requested_samples, train_iters_for_epochs
from megatron.stream.sequential_order import has_rows_alone
from megatron.stream.stream_settings import DatasetFiles, StreamSettings, identify_datasets

__all__ = [
    "DescribedData",
    "described_data",
    "division_of",
    "learning_rates",
    "numerics_of",
    "requested_counts",
    "stream_settings",
    "tokenizer_identity",
    "wanted_launch",
    "without_effect_of",
]

_VERSIONS = ("torch", "deepspeed", "megatron-core")
_SCHEDULE_STATE = ("start_lr", "warmup_iter", "decay_style", "end_iter", "min_lr")


@dataclasses.dataclass(frozen=True)
class DescribedData:
    """The data that a configuration names, looked at."""

    orders: Mapping[StreamName, OrderDescription | None]
    datasets: dict[str, DatasetNote]
    epoch_samples: dict[str, int]  # of the training stream, by component key; see train_epochs
    train_iters: int  # configured, or what train_epochs comes to


def wanted_launch(
    config: RunConfig,
    *,
    records: Mapping[str, DatasetNote] = MappingProxyType({}),
    needs_tokens: bool = True,
    environment: Mapping[str, Any] | None = None,
) -> Wanted:
    """Read what a launch asks for; datasets are identified, which may mean hashing them once.

    Args:
        config: of the launch.
        records: datasets of the run that it continues, by the names that they keep.
        needs_tokens: False: of a dataset its index may be all there is.
        environment: of the machines that train, as attempts record it; None: this one's versions.

    Raises:
        ConfigError: keys that contradict each other.
        DatasetError: a dataset cannot be read.
    """
    training, ledger = config.training, config.ledger
    data = described_data(config, records=records, needs_tokens=needs_tokens)
    schedule = ScheduleSettings.from_config(
        config.lr_scheduler,
        config.optimizer,
        dataclasses.replace(training, train_iters=data.train_iters),
        neox_version=ledger.neox_version,
    )
    return Wanted(
        orders=data.orders,
        datasets=data.datasets,
        train_batch_size=config.geometry.global_batch_size,
        gradient_accumulation_steps=config.geometry.gradient_accumulation_steps,
        train_iters=data.train_iters,
        eval_interval=training.eval_interval or None,
        eval_iters=training.eval_iters,
        division=division_of(config.geometry) if ledger.elastic_batch else None,
        tokenizer=tokenizer_identity(
            config.tokenizer.tokenizer_type, training.vocab_file, training.merge_file
        ),
        accept_data_change=frozenset(ledger.accept_data_change),
        finetune=training.finetune,
        restores_optimizer=not training.no_load_optim,
        restores_random_state=not training.no_load_rng,
        is_recorded=training.save is not None,
        learning_rates=learning_rates(schedule.schedule()),
        schedule_choice=_schedule_choice(schedule),
        numerics=numerics_of(
            config.topology, config.geometry, config.flat(), environment or _own_environment()
        ),
        without_effect=without_effect_of(config.flat()),
        settings=number_settings(config.flat()),
        train_epochs=training.train_epochs,
        epoch_samples=data.epoch_samples,
        notices=_notices(config, data),
    )


def described_data(
    config: RunConfig,
    *,
    records: Mapping[str, DatasetNote] = MappingProxyType({}),
    needs_tokens: bool = True,
) -> DescribedData:
    """Describe the orders of a new run of a configuration.

    Args:
        config: what names the data.
        records: datasets of the run that is continued, by the names that they keep.
        needs_tokens: False: of a dataset its index may be all there is.

    Raises:
        ConfigError: keys that contradict each other, or no step fits the data.
        DatasetError: a dataset cannot be read.
    """
    settings = stream_settings(config)
    identities = identify_datasets(settings, records=records)
    if needs_tokens:
        _require_tokens(identities)
    training, batch = config.training, config.geometry.global_batch_size
    orders = describe_streams(settings, requested_counts(config), identities)
    train = orders["train"]
    if train is None:
        raise ConfigError(
            f"there is no training data: the train share of split={training.split!r} is no "
            f"document of {training.data_path}. Give train a larger share, or a larger dataset"
        )
    prefixes = {identity.digest: files.prefix for files, identity in identities.items()}
    passes = epoch_samples(train, prefixes.__getitem__)
    train_iters = training.train_iters
    if train_iters is None:
        train_iters = train_iters_for_epochs(
            training.train_epochs, list(passes.values()), batch, packing=train.packing
        )
        if train_iters == 0:
            raise ConfigError(
                f"train_epochs={training.train_epochs}: the training data ends before the first "
                f"step, which takes {batch} samples (train_batch_size); use more data, or say in "
                "train_iters how many steps to take, over the data as often as needed"
            )
    notes = {identity.digest: _note(files, identity) for files, identity in identities.items()}
    return DescribedData(dict(orders), notes, passes, train_iters)


def stream_settings(config: RunConfig) -> StreamSettings:
    """Read the data keys from the groups they stand in; lists become tuples."""
    flat = config.flat()
    names = [field.name for field in dataclasses.fields(StreamSettings)]
    values = {name: flat[name] for name in names if flat[name] is not None}
    return StreamSettings(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    )


def tokenizer_identity(
    tokenizer_type: str, vocab_file: str | None, merge_file: str | None
) -> TokenizerIdentity:
    """Return what a tokenizer is: its type and what its files hold, wherever they lie.

    A name that is no file (of a model, of an encoding) stands for its own content.

    Raises:
        ConfigError: a file cannot be read.
    """
    names = [name for name in (vocab_file, merge_file) if name is not None]
    return TokenizerIdentity(type=tokenizer_type, files=tuple(map(_content_digest, names)))


def learning_rates(schedule: LearningRateSchedule) -> LearningRates:
    """Return a schedule the way planning compares it: by the members of NeoX's state."""
    return LearningRates(
        values={name: getattr(schedule, name) for name in _SCHEDULE_STATE}, at=schedule.at
    )


def numerics_of(
    topology: Topology,
    geometry: BatchGeometry,
    flat: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> dict[str, str | int | float]:
    """Return what changes rounding and nothing else, by words for people.

    Args:
        topology: of the ranks.
        geometry: of the batches.
        flat: every key.
        environment: as attempts record it; what it lacks isn't compared.
    """
    zero = flat.get("zero_optimization") or {}
    stages = topology.pipeline_parallel_size if topology.uses_pipeline_engine else 0
    values: dict[str, str | int | float] = {
        "pipe_parallel_size": stages,
        "model_parallel_size": topology.tensor_parallel_size,
        "data-parallel ranks": topology.data_parallel_size,
        "train_micro_batch_size_per_gpu": geometry.micro_batch_size,
        "gradient_accumulation_steps": geometry.gradient_accumulation_steps,
        "ZeRO stage": int(zero.get("stage", 0)) if isinstance(zero, Mapping) else 0,
    }
    versions = environment.get("versions", {})
    values |= {name: versions[name] for name in _VERSIONS if name in versions}
    names = {"num_threads": "threads", "cpu": "CPU type", "device": "device"}
    values |= {names[name]: environment[name] for name in names if environment.get(name)}
    return values


def division_of(geometry: BatchGeometry) -> tuple[int, int, int]:
    """Return micro batch, accumulation and data-parallel ranks."""
    return (
        geometry.micro_batch_size,
        geometry.gradient_accumulation_steps,
        geometry.data_parallel_size,
    )


def without_effect_of(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return what changes neither samples nor numbers and is worth a line."""
    return {name: flat.get(name) for name in ("train_iters", "num_workers")}


def requested_counts(config: RunConfig) -> SplitCounts:
    """Return the samples a run asks of each split, in NeoX's count."""
    training = config.training
    train_iters = training.train_iters
    return requested_samples(
        # a run of 0 steps, which only saves or evaluates, has training data too
        train_iters=max(1, train_iters) if train_iters is not None else None,
        train_batch_size=config.geometry.global_batch_size,
        eval_interval=training.eval_interval or (train_iters or 0) + 1,
        eval_iters=training.eval_iters,
    )


def _note(files: DatasetFiles, identity: DatasetIdentity) -> DatasetNote:
    return DatasetNote(
        path=str(Path(files.prefix).resolve()),
        level=identity.level,
        num_documents=identity.num_documents,
        num_tokens=identity.num_tokens,
        companions={role: str(Path(path).resolve()) for role, path in files.companions},
        index=identity.index_digest,
        pieces=identity.pieces,
    )


def _require_tokens(datasets: Iterable[DatasetFiles]) -> None:
    """Check that every dataset has token files; some of them are enough so far."""
    for files in datasets:
        for prefix in (files.prefix, *(path for _, path in files.companions)):
            tokens = IndexedDataset(prefix).tokens
            if len(tokens.missing) == len(tokens.shards):
                tokens.require_all()


def _notices(config: RunConfig, data: DescribedData) -> tuple[str, ...]:
    """Say of which training data it looks as if it should be read in another way."""
    order, width = data.orders["train"], config.model.seq_length + 1
    if "data_order" in config.written or order is None or order.packing != "packed":
        return ()
    names = {component.dataset for component in order.components}
    paths = sorted(note.path for name, note in data.datasets.items() if name in names)
    return tuple(
        f"every document of {path} has seq_length + 1 = {width} tokens, as in preshuffled data; it "
        "is shuffled all the same, as NeoX does. To read row after row say data_order: sequential"
        for path in paths
        if has_rows_alone(IndexedDataset(path), width - 1)
    )


def _content_digest(name: str) -> str:
    path = Path(name)
    try:
        if path.is_dir():
            files = sorted(one for one in path.rglob("*") if one.is_file())
            lines = [f"{one.relative_to(path)} {_file_digest(one)}" for one in files]
            return hashlib.sha256("\n".join(lines).encode()).hexdigest()
        if path.is_file():  # a checkpoint's configuration may name a device, which never ends
            return _file_digest(path)
    except OSError as error:
        raise ConfigError(f"tokenizer file {error.filename} cannot be read: {error}") from error
    return hashlib.sha256(name.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _schedule_choice(
    schedule: ScheduleSettings,
) -> Literal["refuse", "configured", "checkpoint"]:
    if schedule.overrides_checkpoint:
        return "configured"
    return "checkpoint" if schedule.follows_checkpoint else "refuse"


def _own_environment() -> dict[str, Any]:
    """Return the versions installed here: of a login node, machine and threads say nothing."""
    import importlib.metadata

    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions}
