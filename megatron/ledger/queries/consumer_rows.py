"""What consumed something, as rows to show: attempt, rank, micro step and row added."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from megatron.config.batch_geometry import BatchGeometry
from megatron.ledger.queries.consumers import Consumed
from megatron.ledger.queries.run_view import RunView

__all__ = ["ConsumerRow", "StepTotal", "consumer_rows", "step_totals"]


class ConsumerRow(NamedTuple):
    """One document, or a part of it, in one sample of one step."""

    step: int
    attempt: int | None  # None: adopted, not taken yet, or an evaluation
    is_abandoned: bool
    position: int  # of the stream
    data_parallel_rank: int | None  # None, with the next two: the ledger doesn't tell
    micro_step: int | None
    row: int | None
    component: str  # key
    epoch: int  # the how-manieth pass over the document, from 1
    block: int
    sample: int
    document: int
    start: int  # tokens from the document's begin
    stop: int


class StepTotal(NamedTuple):
    """What one step consumed in sum."""

    step: int
    is_abandoned: bool
    samples: int
    tokens: int  # the last one of a sample is counted again as the next one's first


def consumer_rows(run: RunView, parts: Iterable[Consumed]) -> list[ConsumerRow]:
    """Return rows in order of steps and positions, abandoned ones after those of the lineage."""
    rows = [row for part in parts for row in _rows(run, part)]
    rows.sort(key=lambda row: (row.step, row.is_abandoned, row.attempt or 0, row.position))
    return rows


def step_totals(parts: Iterable[Consumed]) -> list[StepTotal]:
    """Return one row per step; a step that was abandoned and done again has two."""
    totals: dict[tuple[int, bool], tuple[int, int]] = {}
    for part in parts:
        is_abandoned = part.course.abandoned_by is not None
        steps, first, counts = np.unique(part.step, return_index=True, return_counts=True)
        tokens = np.add.reduceat(part.found.length, first)
        for step, begin, count, of_step in zip(
            steps.tolist(), first.tolist(), counts.tolist(), tokens.tolist(), strict=True
        ):
            samples = len(np.unique(part.position[begin : begin + count]))
            before = totals.get((step, is_abandoned), (0, 0))
            totals[step, is_abandoned] = (before[0] + samples, before[1] + of_step)
    return [StepTotal(*key, *total) for key, total in sorted(totals.items())]


def _rows(run: RunView, part: Consumed) -> Iterator[ConsumerRow]:
    facts = part.course.abandoned_by
    key = part.order.components[part.component].key
    found = part.found
    offset = (part.position - part.segment.first_position) % part.segment.batch_size
    for index, step in enumerate(part.step.tolist()):
        geometry: BatchGeometry | None = None
        attempt = None
        if facts is not None:
            attempt, geometry = facts.number, facts.geometry
        elif part.course.stream == "train":
            span = run.lineage.span_of(step)
            attempt = None if span is None else span.attempt
            geometry = run.geometry_of(step)
        rank, micro_step, row = _place(geometry, int(offset[index]))
        yield ConsumerRow(
            step,
            attempt,
            facts is not None,
            int(part.position[index]),
            rank,
            micro_step,
            row,
            key,
            int(found.epoch[index]),
            int(found.block[index]),
            int(found.sample[index]),
            int(found.document[index]),
            int(found.start[index]),
            int(found.start[index] + found.length[index]),
        )


def _place(
    geometry: BatchGeometry | None, offset: int
) -> tuple[int, int, int] | tuple[None, None, None]:
    """Return rank, micro step and row of a sample by its offset in the batch."""
    if geometry is None:
        return None, None, None
    slot = geometry.slot(offset)
    return slot.data_parallel_rank, slot.micro_step, slot.row
