"""The data of a run: the plan all ranks agree on, and where each stream is read next."""

import contextlib
import functools
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import ConfigError, DatasetError
from megatron.cli.wanted_launch import requested_counts, stream_settings
from megatron.config.batch_geometry import BatchGeometry
from megatron.config.load import RunConfig
from megatron.data.loader import MicroBatchLoader
from megatron.data.tokenizers import build_tokenizer
from megatron.data.vocabulary_check import VocabularyCheck
from megatron.engine.agreement import together
from megatron.engine.consumed import ConsumedDigests
from megatron.engine.distributed import ProcessGroups
from megatron.engine.steps import BatchFormat, MicroBatchSource
from megatron.ledger.ledger_file import DatasetNote
from megatron.ledger.planning.inputs import StreamName
from megatron.ledger.planning.resume_plan import ResumePlan
from megatron.stream.descriptions import map_names, open_order
from megatron.stream.identity import DatasetIdentity
from megatron.stream.sample_stream import Stream
from megatron.stream.segments import Segment
from megatron.stream.stream_settings import DatasetFiles, identify_datasets

__all__ = [
    "RunData",
    "TokenizerFacts",
    "builders_per_node",
    "look_at_tokenizer",
    "open_run_data",
]


@dataclass(frozen=True)
class TokenizerFacts:
    """What training needs to know of the tokenizer."""

    vocab_size: int  # entries, before padding
    eod: int | None


def look_at_tokenizer(config: RunConfig) -> TokenizerFacts:
    """Open the tokenizer that the configuration names.

    Raises:
        ConfigError: it cannot be opened, or lacks what other keys need.
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
    return TokenizerFacts(tokenizer.vocab_size, tokenizer.eod)


@dataclass(frozen=True)
class RunData:
    """The streams of this rank (none if it doesn't read) and what is known of them everywhere."""

    config: RunConfig
    groups: ProcessGroups
    plan: ResumePlan
    tokenizer: TokenizerFacts
    streams: Mapping[str, Stream]
    layouts: Mapping[str, "_Layout"]  # of every stream that is read

    def open_sources(
        self, stack: contextlib.ExitStack, *, vocabulary_rows: int
    ) -> dict[str, MicroBatchSource | None]:
        """Return the micro batches of each stream, from where the plan goes on.

        Args:
            stack: what must be closed is put on it.
            vocabulary_rows: token ids must be below this (padded) number.
        """
        source = functools.partial(self._source, stack=stack, vocabulary_rows=vocabulary_rows)
        return {
            "train": source("train", self.config.geometry, stop_position=self.train_end),
            "valid": source("valid", self._evaluation_geometry),
            "test": source("test", self._evaluation_geometry),
        }

    @property
    def train_end(self) -> int:
        """Position at which the training stream is left when ``train_iters`` steps are done."""
        return self._train_segment.positions(max(self.plan.train_iters, self.plan.next_step)).stop

    def train_tokens(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Return samples of the training stream without labels; nothing is consumed.

        Call it on a rank that reads, such as rank 0.
        """
        samples = _SegmentReader(self.streams["train"], self._train_segment).read(positions)
        return samples[:, 0] if self.layouts["train"].has_labels else samples

    def has_read_before(self, position: int) -> bool:
        """Whether ``position`` is read now as it was before this launch: from the same order."""
        segment = self._train_segment
        return segment.first_step < self.plan.next_step and segment.first_position <= position

    @property
    def _train_segment(self) -> Segment:
        return self.plan.train.state.segments.at_step(self.plan.next_step)

    @property
    def _evaluation_geometry(self) -> BatchGeometry:
        """One evaluation as if it were a step."""
        geometry = self.config.geometry
        return BatchGeometry(
            micro_batch_size=geometry.micro_batch_size,
            data_parallel_size=geometry.data_parallel_size,
            gradient_accumulation_steps=geometry.gradient_accumulation_steps
            * max(1, self.config.training.eval_iters),
        )

    def _source(
        self,
        split: str,
        geometry: BatchGeometry,
        *,
        stack: contextlib.ExitStack,
        vocabulary_rows: int,
        stop_position: int | None = None,
    ) -> MicroBatchSource | None:
        layout = self.layouts.get(split)
        if layout is None:
            return None
        planned = self.plan.streams[cast(StreamName, split)]
        position = planned.state.next_position
        stream = self.streams.get(split)
        loader, consumed = None, None
        rank = self.groups.place.data_parallel_rank
        if stream is not None:
            name = self.config.training.data_path or f"{split} data"
            segment = planned.state.segments.at_step(planned.next_step)
            loader = MicroBatchLoader(
                VocabularyCheck(_SegmentReader(stream, segment), vocabulary_rows, source=name),
                geometry,
                rank,
                position,
                self.config.training.num_workers,
                first_step=planned.next_step,
                stop_position=stop_position,
            )
            if self.config.training.save is not None:
                consumed = ConsumedDigests(
                    geometry, rank, first_step=planned.next_step, first_position=position
                )
        batch_format = BatchFormat(
            micro_batch_size=geometry.micro_batch_size,
            seq_length=self.config.model.seq_length,
            storage_dtype=layout.dtype,
            has_labels=layout.has_labels,
            eod=self.tokenizer.eod,
            eod_mask_loss=self.config.other.eod_mask_loss,
        )
        source = MicroBatchSource(
            loader, batch_format, self.groups, first_position=position, consumed=consumed
        )
        stack.callback(source.close)
        return source


@dataclass(frozen=True)
class _Layout:
    """What is read of a stream's samples."""

    dtype: np.dtype[Any]
    has_labels: bool

    @classmethod
    def of(cls, stream: Stream) -> "_Layout":
        if not stream.has_labels:
            return cls(stream.dtype, has_labels=False)
        return cls(np.promote_types(stream.dtype, stream.label_dtype), has_labels=True)


class _SegmentReader:
    """Samples by stream position, labels beside the tokens if there are any: the segment says where
    that is in its order.
    """

    def __init__(self, stream: Stream, segment: Segment) -> None:
        self._stream = stream
        self._offset = segment.order_position(0)

    def read(self, positions: NDArray[np.int64], /) -> NDArray[Any]:
        """Return the samples at stream ``positions``."""
        places = positions + self._offset
        tokens = self._stream.read(places)
        if not self._stream.has_labels:
            return tokens
        return np.stack([tokens, self._stream.read_labels(places)], axis=1)


def open_run_data(config: RunConfig, groups: ProcessGroups, plan: ResumePlan) -> RunData:
    """Open the planned streams; index maps are built by one rank while the others wait.

    With ``use_shared_fs: false`` one rank of every node builds that node's.

    Raises:
        MegatronError: on every rank, if any of them cannot open its part.
    """
    reads = groups.topology.reads_data(groups.place)
    is_builder = groups.rank == 0
    if not config.training.use_shared_fs:
        looks = groups.gather((groups.local_rank, reads))
        is_builder = groups.rank in builders_per_node(*zip(*looks, strict=True))

    def look() -> TokenizerFacts | None:
        return look_at_tokenizer(config) if groups.rank == 0 else None

    tokenizer = groups.from_rank_0(together(groups, look))

    def build() -> dict[str, Stream]:
        return _open(config, plan, is_builder=True) if is_builder else {}

    built = together(groups, build)

    def read() -> dict[str, Stream]:
        if not reads or built:
            return built if reads else {}
        return _open(config, plan, is_builder=False)

    streams = together(groups, read)
    layouts = groups.from_rank_0({name: _Layout.of(stream) for name, stream in streams.items()})
    return RunData(config, groups, plan, tokenizer, streams, layouts)


def builders_per_node(local_ranks: Sequence[int], reads: Sequence[bool]) -> set[int]:
    """Return the first rank of each node that reads data; a node without one needs no index maps.

    Args:
        local_ranks: of every rank, in rank order; a node's ranks follow each other, from 0.
        reads: whether each rank reads data.

    Example:
        >>> sorted(builders_per_node([0, 1, 0, 1], [False, True, True, True]))
        [1, 2]
    """
    builders = set()
    is_built = False
    for rank, (local_rank, does_read) in enumerate(zip(local_ranks, reads, strict=True)):
        is_built = is_built and local_rank != 0
        if does_read and not is_built:
            builders.add(rank)
            is_built = True
    return builders


def _open(config: RunConfig, plan: ResumePlan, *, is_builder: bool) -> dict[str, Stream]:
    """Open the planned streams from what this node's files are.

    Raises:
        DatasetError: they are not what the plan, which rank 0 made, reads.
    """
    settings = stream_settings(config)
    identities = identify_datasets(settings, records=plan.datasets)
    names = map_names(settings, requested_counts(config), identities)
    located = {identity.digest: files for files, identity in identities.items()}

    def locate(dataset: str) -> DatasetFiles:
        if dataset not in located:
            raise DatasetError(_other_data(plan.datasets[dataset], dataset, identities))
        files = located[dataset]
        label = None if files.label is None else str(Path(files.label).resolve())
        return DatasetFiles(str(Path(files.prefix).resolve()), label)

    return {
        split: open_order(
            planned.order,
            locate,
            names=names.get(split),
            is_builder=is_builder,
            barrier=lambda: None,
            warm_up=config.training.mmap_warmup,
        )
        for split, planned in plan.streams.items()
        if planned.is_read
    }


def _other_data(
    note: DatasetNote, dataset: str, identities: Mapping[DatasetFiles, DatasetIdentity]
) -> str:
    """Say what lies on this node instead of a planned dataset."""
    there = "; ".join(
        f"{files.prefix}: {one.num_documents} documents, {one.num_tokens} tokens, content "
        f"{one.digest[:12]}"
        for files, one in identities.items()
    )
    return (
        f"{socket.gethostname()} has other data than the node of rank 0, whose {note.path} has "
        f"{note.num_documents} documents, {note.num_tokens} tokens, content {dataset[:12]}. Here "
        f"is {there}. Copy the same files to every node"
    )
