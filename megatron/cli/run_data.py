"""The data of a run: tokenizer, streams, and where each of them is read next."""

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.base.errors import ConfigError
from megatron.config.load import RunConfig
from megatron.data.loader import MicroBatchLoader
from megatron.data.tokenizers import build_tokenizer
from megatron.data.vocabulary_check import VocabularyCheck
from megatron.engine.agreement import together
from megatron.engine.distributed import ProcessGroups
from megatron.engine.steps import BatchFormat, MicroBatchSource
from megatron.stream.sample_counts import requested_samples, train_iters_for_epochs
from megatron.stream.streams import Stream, Streams, StreamSettings, open_streams

__all__ = ["RunData", "Sources", "open_run_data"]

_NO_TRAINING_DATA = (
    "there is no training data: the train share of split={split!r} is no document of {data_path}. "
    "Give train a larger share, or a larger dataset"
)


@dataclass(frozen=True)
class _Summary:
    """What every rank must know of the data, also those that read none."""

    vocab_size: int  # entries of the tokenizer, before padding
    eod: int | None
    train_iters: int
    dtypes: dict[str, np.dtype[Any] | None]  # storage type per split; None: no such stream


@dataclass(frozen=True)
class Sources:
    """Endless micro batches per split; None where the run has no such data."""

    train: MicroBatchSource
    valid: MicroBatchSource | None
    test: MicroBatchSource | None


@dataclass(frozen=True)
class RunData:
    """The streams of this rank (none if it doesn't read) and what is known of them everywhere."""

    config: RunConfig
    groups: ProcessGroups
    summary: _Summary
    streams: Streams | None

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer, before padding."""
        return self.summary.vocab_size

    @property
    def train_iters(self) -> int:
        """Steps of the whole run."""
        return self.summary.train_iters

    def open_sources(
        self, stack: contextlib.ExitStack, *, consumed_steps: int, vocabulary_rows: int
    ) -> Sources:
        """Return the sources of a run that has taken ``consumed_steps`` steps already.

        Every evaluation consumes eval_iters global batches, and the one due at a step counts as
        done with it.

        Args:
            stack: what must be closed is put on it.
            consumed_steps: steps done.
            vocabulary_rows: token ids must be below this (padded) number.
        """
        source = functools.partial(self._source, stack=stack, vocabulary_rows=vocabulary_rows)
        training = self.config.training
        batch = self.config.geometry.global_batch_size
        interval = training.eval_interval
        evaluations = consumed_steps // interval if interval else 0
        end = self.train_iters * batch
        train = source("train", consumed_steps * batch, stop_position=end)
        assert train is not None  # noqa: S101 - open_run_data has checked it
        has_evaluations = training.eval_iters > 0
        valid_position = evaluations * training.eval_iters * batch
        return Sources(
            train=train,
            valid=source("valid", valid_position) if has_evaluations else None,
            test=source("test", 0) if has_evaluations else None,
        )

    def _source(
        self,
        split: str,
        first_position: int,
        *,
        stack: contextlib.ExitStack,
        vocabulary_rows: int,
        stop_position: int | None = None,
    ) -> MicroBatchSource | None:
        dtype = self.summary.dtypes[split]
        if dtype is None:
            return None
        stream: Stream | None = getattr(self.streams, split) if self.streams else None
        loader = None
        geometry = self.config.geometry
        if stream is not None:
            name = self.config.training.data_path or f"{split} data"
            loader = MicroBatchLoader(
                VocabularyCheck(stream, vocabulary_rows, source=name),
                geometry,
                self.groups.place.data_parallel_rank,
                first_position,
                self.config.training.num_workers,
                first_step=first_position // geometry.global_batch_size + 1,
                stop_position=stop_position,
            )
        batch_format = BatchFormat(
            micro_batch_size=geometry.micro_batch_size,
            seq_length=self.config.model.seq_length,
            storage_dtype=dtype,
            eod=self.summary.eod,
            eod_mask_loss=self.config.other.eod_mask_loss,
        )
        source = MicroBatchSource(loader, batch_format, self.groups)
        stack.callback(source.close)
        return source


def open_run_data(config: RunConfig, groups: ProcessGroups) -> RunData:
    """Open tokenizer and streams; index maps are built by one rank while the others wait.

    Raises:
        MegatronError: on every rank, if any of them cannot open its part.
    """
    # With `use_shared_fs: false` every node needs its own copy of the maps.
    is_builder = groups.rank == 0 if config.training.use_shared_fs else groups.local_rank == 0
    reads = groups.topology.reads_data(groups.place)

    def build() -> tuple[_Summary, Streams] | None:
        if not is_builder:
            return None
        tokenizer = build_tokenizer(
            config.tokenizer.tokenizer_type,
            vocab_file=config.training.vocab_file,
            merge_file=config.training.merge_file,
        )
        streams = _open(config, is_builder=True)
        return _summarise(config, tokenizer, streams), streams

    built = together(groups, build)
    if built is None:
        built_streams = together(groups, lambda: _open(config, is_builder=False) if reads else None)
    else:
        built_streams = together(groups, lambda: built[1])
    summary = groups.from_rank_0(built[0] if built is not None else None)
    return RunData(config, groups, summary, built_streams if reads else None)


def _open(config: RunConfig, *, is_builder: bool) -> Streams:
    training = config.training
    settings = _stream_settings(config)
    train_iters = training.train_iters
    requested = requested_samples(
        # a run of 0 steps, which only saves or evaluates, has training data too
        train_iters=max(1, train_iters) if train_iters is not None else None,
        train_batch_size=config.geometry.global_batch_size,
        eval_interval=training.eval_interval or (train_iters or 0) + 1,
        eval_iters=training.eval_iters,
    )
    return open_streams(settings, requested, is_builder=is_builder, barrier=lambda: None)


def _stream_settings(config: RunConfig) -> StreamSettings:
    """Read the data keys from the groups they stand in; lists become tuples."""
    flat = config.flat()
    names = [field.name for field in dataclasses.fields(StreamSettings)]
    values = {name: flat[name] for name in names if flat[name] is not None}
    return StreamSettings(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    )


def _summarise(config: RunConfig, tokenizer: Any, streams: Streams) -> _Summary:
    if streams.train is None:
        raise ConfigError(
            _NO_TRAINING_DATA.format(
                split=config.training.split, data_path=config.training.data_path
            )
        )
    training = config.training
    train_iters = training.train_iters
    if train_iters is None:
        batch = config.geometry.global_batch_size
        train_iters = train_iters_for_epochs(
            training.train_epochs,
            [order.head_length + 1 for order in streams.train.orders],
            batch,
        )
        if train_iters == 0:
            raise ConfigError(
                f"train_epochs={training.train_epochs}: the training data ends before the first "
                f"step, which takes {batch} samples (train_batch_size); use more data, or say in "
                "train_iters how many steps to take, over the data as often as needed"
            )
    if config.other.eod_mask_loss and tokenizer.eod is None:
        raise ConfigError(
            f"eod_mask_loss: true needs an end-of-document token, but the tokenizer "
            f"{training.vocab_file} has no <|endoftext|>"
        )
    by_split = {"train": streams.train, "valid": streams.valid, "test": streams.test}
    return _Summary(
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        train_iters=train_iters,
        dtypes={name: stream.dtype if stream else None for name, stream in by_split.items()},
    )
