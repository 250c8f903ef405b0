"""Where two runs part: in what they were to read, in what they read, and in their losses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.ledger.attempt_facts import read_all_attempt_facts
from megatron.ledger.attempts import StepRecord
from megatron.ledger.queries.run_view import RunView
from megatron.stream.order_description import OrderDescription
from megatron.stream.segments import Segment

__all__ = ["Differences", "compare_runs"]


@dataclass(frozen=True, kw_only=True)
class Differences:
    """What two runs have in common, and where that ends."""

    steps: tuple[int, int]  # done by each
    common_ancestor: int | None  # last step both took as one run; None: they are not related
    samples_part_at: int | None  # first step that is planned to read other samples
    reason: tuple[str, ...]  # what about the samples is different there
    compared: int  # steps with a line in both
    digests_part_at: int | None  # first step that really read other samples
    losses_part_at: int | None
    largest_loss_difference: float
    config: Mapping[str, tuple[Any, Any]]  # keys of the newest launches that differ

    @property
    def reads_the_same(self) -> bool:
        """Whether both consume the same samples in the same steps, as far as both went."""
        return self.samples_part_at is None and self.digests_part_at is None


def compare_runs(one: RunView, other: RunView) -> Differences:
    """Compare two lineages step by step, as far as both went.

    Raises:
        RunDirectoryError: a run's lines cannot be read.
    """
    last = min(one.ledger.step, other.ledger.step)
    parts_at, reason = _parting(one, other, last)
    compared, digests_part_at, losses_part_at, largest = 0, None, None, 0.0
    for mine, theirs in _common_records(one, other, last):
        compared += 1
        if mine.digest != theirs.digest and digests_part_at is None:
            digests_part_at = mine.step
        if mine.loss != theirs.loss and not (math.isnan(mine.loss) and math.isnan(theirs.loss)):
            losses_part_at = mine.step if losses_part_at is None else losses_part_at
            largest = max(largest, abs(mine.loss - theirs.loss))
    return Differences(
        steps=(one.ledger.step, other.ledger.step),
        common_ancestor=_common_ancestor(one, other),
        samples_part_at=parts_at,
        reason=reason,
        compared=compared,
        digests_part_at=digests_part_at,
        losses_part_at=losses_part_at,
        largest_loss_difference=largest,
        config=_config_differences(one, other),
    )


def _parting(one: RunView, other: RunView, last: int) -> tuple[int | None, tuple[str, ...]]:
    """Return the first step whose samples differ by plan, and why."""
    tables = (one.stream("train").segments, other.stream("train").segments)
    # Between borders both move on evenly, so that looking at the first step of a piece is enough.
    borders = sorted({segment.first_step for table in tables for segment in table})
    for step in borders:
        if step > last:
            return None, ()
        mine, theirs = tables[0].at_step(step), tables[1].at_step(step)
        reason = [
            *_order_differences(one.order(mine), other.order(theirs)),
            *_place_differences(mine, theirs, step),
        ]
        if reason:
            return step, tuple(reason)
    return None, ()


def _order_differences(one: OrderDescription, other: OrderDescription) -> list[str]:
    reasons = [
        f"{name} {getattr(one, name)} and {getattr(other, name)}"
        for name in ("seed", "seq_length", "packing", "allow_chopped")
        if getattr(one, name) != getattr(other, name)
    ]
    keys = [[component.key for component in order.components] for order in (one, other)]
    if keys[0] != keys[1]:
        reasons.append(f"datasets {', '.join(keys[0])} and {', '.join(keys[1])}")
    if one.weights != other.weights:
        reasons.append(f"weights {one.weights} and {other.weights}")
    if one != other and not reasons:
        reasons.append("heads or cursors of the datasets")
    return reasons


def _place_differences(one: Segment, other: Segment, step: int) -> list[str]:
    reasons = []
    if one.batch_size != other.batch_size:
        reasons.append(f"train_batch_size {one.batch_size} and {other.batch_size}")
    places = [segment.order_position(segment.positions(step).start) for segment in (one, other)]
    if places[0] != places[1]:
        reasons.append(f"places {places[0]} and {places[1]} in the order")
    return reasons


def _common_records(one: RunView, other: RunView, last: int) -> list[tuple[StepRecord, StepRecord]]:
    theirs = {record.step: record for record in other.lineage.steps(1, last)}
    return [
        (record, theirs[record.step])
        for record in one.lineage.steps(1, last)
        if record.step in theirs
    ]


def _common_ancestor(one: RunView, other: RunView) -> int | None:
    """Return the last step of the spans that both lineages share."""
    shared = None
    for mine, theirs in zip(one.ledger.spans, other.ledger.spans, strict=False):
        if (mine.run_id, mine.attempt) != (theirs.run_id, theirs.attempt):
            break
        shared = min(mine.last_step, theirs.last_step)
        if mine.last_step != theirs.last_step:
            break
    return shared


def _config_differences(one: RunView, other: RunView) -> dict[str, tuple[Any, Any]]:
    mine, theirs = _newest_config(one), _newest_config(other)
    return {
        key: (mine.get(key), theirs.get(key))
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    }


def _newest_config(run: RunView) -> Mapping[str, Any]:
    attempts = [] if run.save is None else read_all_attempt_facts(run.save)
    return attempts[-1].config if attempts else {}
