"""Which samples steps consume, and which rank, micro step and row each goes to."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron.config.batch_geometry import BatchGeometry
from megatron.ledger.attempts import EvaluationRecord, StepRecord, decode_line
from megatron.ledger.ledger_file import Span
from megatron.ledger.queries.required import StreamSteps
from megatron.ledger.queries.run_view import RunView, Stage
from megatron.stream.blending import Blend
from megatron.stream.order_description import OrderDescription
from megatron.stream.segments import Segment

__all__ = [
    "Draw",
    "Slot",
    "StepFrame",
    "planned_frame",
    "recorded_line",
    "step_draws",
    "step_frame",
    "step_slots",
]


class Slot(NamedTuple):
    """Where in the job a sample of a step is consumed; all count from 0."""

    micro_step: int
    data_parallel_rank: int
    row: int


class Draw(NamedTuple):
    """From which component a position is drawn; known without any data."""

    component: int  # index into the order's components
    position: int  # within the component's own order


@dataclass(frozen=True, kw_only=True)
class StepFrame:
    """All that is known of a step without its data."""

    stream: str
    step: int
    stage: Stage
    segment: Segment
    order: OrderDescription
    positions: range  # of the stream
    span: Span | None  # by which attempt it was taken
    geometry: BatchGeometry | None

    @property
    def order_positions(self) -> range:
        """Where the samples stand in the order."""
        start = self.segment.order_position(self.positions.start)
        return range(start, start + len(self.positions))


def step_frame(run: RunView, step: int, stream: str = "train") -> StepFrame:
    """Return what is known of a step; of an evaluation stream, of its ``step``-th evaluation.

    Raises:
        ValueError: the step is below 1.
        RunDirectoryError: the run has no such stream.
    """
    table = run.stream(stream).segments
    segment = table.at_step(step)
    positions = segment.positions(step)
    stage: Stage
    if stream == "train":
        stage, span, geometry = run.stage(step), run.lineage.span_of(step), run.geometry_of(step)
    else:
        stage, span = _evaluation(run, stream, positions)
        geometry = span.geometry if span is not None else None
        if stage == "adopted":
            geometry = run.adopted_geometry
    return StepFrame(
        stream=stream,
        step=step,
        stage=stage,
        segment=segment,
        order=run.order(segment),
        positions=positions,
        span=span,
        geometry=geometry,
    )


def planned_frame(stream: StreamSteps, step: int, name: str) -> StepFrame:
    """Return what is known of a step of a launch that wasn't made.

    Args:
        stream: the steps of the stream called ``name``.
        step: from 1.
        name: train, valid or test.
    """
    segment = stream.segments.at_step(step)
    return StepFrame(
        stream=name,
        step=step,
        stage="planned",
        segment=segment,
        order=stream.orders[segment.order_id],
        positions=segment.positions(step),
        span=None,
        geometry=None,
    )


def step_slots(frame: StepFrame) -> list[Slot] | None:
    """Return who consumes each sample of a step; None if the ledger doesn't tell."""
    geometry = frame.geometry
    if geometry is None:
        return None
    offsets = np.arange(len(frame.positions))
    groups, row = np.divmod(offsets, geometry.micro_batch_size)
    micro_step, rank = np.divmod(groups, geometry.data_parallel_size)
    return list(map(Slot, micro_step.tolist(), rank.tolist(), row.tolist()))


def step_draws(order: OrderDescription, order_positions: range) -> list[Draw]:
    """Return which component each position of an order draws from; needs no data."""
    positions = np.arange(order_positions.start, order_positions.stop, dtype=np.int64)
    starts = np.array([component.start for component in order.components], dtype=np.int64)
    component, index = Blend(order.weights or (1.0,)).locate(positions)
    return list(map(Draw, component.tolist(), (index + starts[component]).tolist()))


def recorded_line(run: RunView, frame: StepFrame) -> StepRecord | EvaluationRecord | None:
    """Return what was written down when a step, or an evaluation, was done."""
    if frame.stream == "train":
        return run.lineage.step(frame.step)
    return next((line for _, line in _lines_at(run, frame.stream, frame.positions.start)), None)


def _evaluation(run: RunView, stream: str, positions: range) -> tuple[Stage, Span | None]:
    if positions.start >= run.stream(stream).next_position:
        return "planned", run.newest_span
    for span, _ in _lines_at(run, stream, positions.start):
        return "recorded", span
    # Of evaluations before an adopted checkpoint there never were lines.
    return ("unrecorded" if run.ledger.adopted is None else "adopted"), None


def _lines_at(run: RunView, stream: str, position: int) -> Iterator[tuple[Span, EvaluationRecord]]:
    """Find the evaluation that began at a position, without decoding whole files."""
    begin = b'^{"stream": "%s", "after_step": [0-9]+, "position": %d, .*$'
    pattern = re.compile(begin % (stream.encode(), position), re.MULTILINE)
    for span in run.ledger.spans:
        path = run.lineage.lines_path(span)
        for text in pattern.findall(_covered(path, span)) if path is not None else ():
            record = decode_line(text).record
            if isinstance(record, EvaluationRecord) and not record.at_end:
                yield span, record


def _covered(path: Path, span: Span) -> bytes:
    """Return the lines of a file that are on the lineage: what comes later was abandoned."""
    content = path.read_bytes()
    last = b'"chain": "%s"}' % span.chain.encode()
    found = content.find(last)
    return content if found < 0 else content[: found + len(last)]
