"""The steps of a stream as ranges of its orders' positions, and the files that they read."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.order_description import OrderDescription
from megatron.stream.required_files import FileUse, required_files
from megatron.stream.sample_stream import Stream
from megatron.stream.segments import SegmentTable
from megatron.stream.shard_layout import Shard
from megatron.stream.token_bytes import TokenBytes

__all__ = ["RequiredFile", "StepPiece", "StreamSteps", "required_by_steps"]


class StepPiece(NamedTuple):
    """Consecutive steps of one segment."""

    steps: range
    order: OrderDescription
    positions: range  # of the order
    first_position: int  # of the stream
    batch_size: int

    def step_of(self, position: int) -> int:
        """Return the step that reads a position of the order."""
        return self.steps.start + (position - self.positions.start) // self.batch_size


@dataclasses.dataclass(frozen=True)
class StreamSteps:
    """The steps of one stream of a run, done or to come."""

    segments: SegmentTable
    orders: Mapping[str, OrderDescription]

    def pieces(self, steps: range) -> Iterator[StepPiece]:
        """Yield consecutive steps, divided where a segment begins."""
        table = self.segments.segments
        ends = [*(segment.first_step for segment in table[1:]), steps.stop]
        for segment, end in zip(table, ends, strict=True):
            part = range(max(steps.start, segment.first_step), min(steps.stop, end))
            if part:
                first = segment.positions(part.start).start
                start = segment.order_position(first)
                positions = range(start, start + len(part) * segment.batch_size)
                order = self.orders[segment.order_id]
                yield StepPiece(part, order, positions, first, segment.batch_size)


@dataclasses.dataclass(frozen=True)
class RequiredFile:
    """A file that steps read from."""

    shard: Shard
    samples: int
    num_bytes: int  # read; what several samples have in common counts as often
    first_step: int
    last_step: int
    start: int  # first byte of the file that is read
    stop: int
    ranges: tuple[tuple[int, int], ...] | None  # None: not asked for


def required_by_steps(
    pieces: Iterable[StepPiece],
    open_order: Callable[[OrderDescription], Stream],
    tokens_of: Callable[[IndexedDataset], TokenBytes],
    *,
    with_ranges: bool = False,
    on_samples: Callable[[int], None] = lambda done: None,
) -> list[RequiredFile]:
    """Return the files that steps read from; token files need not be there.

    Args:
        pieces: the steps.
        open_order: opens an order.
        tokens_of: the files of a dataset.
        with_ranges: collect ranges of bytes too.
        on_samples: told how many samples are done.
    """
    files: dict[str, RequiredFile] = {}
    done = 0
    for piece in pieces:
        uses = required_files(
            open_order(piece.order),
            piece.positions,
            tokens_of=tokens_of,
            with_ranges=with_ranges,
            on_positions=functools.partial(_add, on_samples, done),
        )
        done += len(piece.positions)
        for use in uses:
            found = _required(piece, use)
            known = files.get(str(use.shard.path))
            files[str(use.shard.path)] = found if known is None else _joined(known, found)
    return list(files.values())


def _add(on_samples: Callable[[int], None], before: int, count: int) -> None:
    on_samples(before + count)


def _required(piece: StepPiece, use: FileUse) -> RequiredFile:
    return RequiredFile(
        shard=use.shard,
        samples=use.num_samples,
        num_bytes=use.num_bytes,
        first_step=piece.step_of(use.first_position),
        last_step=piece.step_of(use.last_position),
        start=use.start,
        stop=use.stop,
        ranges=use.ranges,
    )


def _joined(one: RequiredFile, other: RequiredFile) -> RequiredFile:
    """Return what two ranges of steps read of a file, the later second."""
    return RequiredFile(
        shard=one.shard,
        samples=one.samples + other.samples,
        num_bytes=one.num_bytes + other.num_bytes,
        first_step=one.first_step,
        last_step=other.last_step,
        start=min(one.start, other.start),
        stop=max(one.stop, other.stop),
        ranges=None
        if one.ranges is None or other.ranges is None
        else _merged([*one.ranges, *other.ranges]),
    )


def _merged(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)
