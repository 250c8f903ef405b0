"""Which order and which positions a step consumes, over all changes a run has seen.

A *segment* is a range of steps with one order and one batch size. Positions run on across segments;
only where a position points in an order starts anew. For evaluation streams a "step" is one
evaluation, numbered from 1.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

__all__ = ["Segment", "SegmentTable"]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """From ``first_step`` on, each step consumes the next ``batch_size`` samples of an order.

    Example:
        >>> segment = Segment(
        ...     first_step=11, batch_size=4, first_position=80, order_id="a", first_order_position=0
        ... )
        >>> segment.positions(13)
        range(88, 92)
        >>> segment.order_position(90)
        10
    """

    first_step: int  # from 1
    batch_size: int  # samples per step
    first_position: int  # stream position of the first step's first sample
    order_id: str
    first_order_position: int  # the order's position of that sample

    def positions(self, step: int) -> range:
        """Return the stream positions that ``step`` consumes; it must not precede the segment."""
        if step < self.first_step:
            raise ValueError(f"step {step} precedes the segment's first step {self.first_step}")
        start = self.first_position + (step - self.first_step) * self.batch_size
        return range(start, start + self.batch_size)

    def order_position(self, position: int) -> int:
        """Return where the stream's ``position`` stands in the segment's order."""
        return self.first_order_position + position - self.first_position


@dataclass(frozen=True)
class SegmentTable:
    """The segments of one stream's lineage, in order of their steps."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        for before, after in zip(self.segments, self.segments[1:], strict=False):
            if after.first_step <= before.first_step:
                raise ValueError(f"segments out of order: {before} then {after}")
            expected = before.positions(after.first_step).start
            if after.first_position != expected:
                raise ValueError(
                    f"the segment from step {after.first_step} begins at position "
                    f"{after.first_position}, but the one before ends at {expected}"
                )

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def at_step(self, step: int) -> Segment:
        """Return the segment of ``step``.

        Raises:
            ValueError: the step precedes the first segment.
        """
        index = bisect_right(self.segments, step, key=lambda segment: segment.first_step) - 1
        if index < 0:
            raise ValueError(f"step {step} precedes the first segment")
        return self.segments[index]

    def positions(self, step: int) -> range:
        """Return the stream positions of ``step``."""
        return self.at_step(step).positions(step)

    def step_of(self, position: int) -> int:
        """Return the step that consumes ``position``; the inverse of :meth:`positions`.

        Raises:
            ValueError: the position precedes the first segment.
        """
        index = bisect_right(self.segments, position, key=lambda one: one.first_position) - 1
        if index < 0:
            raise ValueError(f"position {position} precedes the first segment")
        segment = self.segments[index]
        return segment.first_step + (position - segment.first_position) // segment.batch_size

    def cut_after(self, step: int) -> Self:
        """Return the table as it was when ``step`` was done and nothing after it."""
        kept = tuple(one for one in self.segments if one.first_step <= max(step, 1))
        return replace(self, segments=kept)

    def followed_by(
        self, *, after_step: int, batch_size: int, order_id: str, first_order_position: int
    ) -> Self:
        """Return the table with a new segment from the step after ``after_step`` on.

        A segment that consumes exactly what the last one would is not added.
        """
        table = self.cut_after(after_step)
        first_step = after_step + 1
        last = table.at_step(first_step)
        position = last.positions(first_step).start
        unchanged = (
            last.batch_size == batch_size
            and last.order_id == order_id
            and last.order_position(position) == first_order_position
        )
        if unchanged:
            return table
        segment = Segment(
            first_step=first_step,
            batch_size=batch_size,
            first_position=position,
            order_id=order_id,
            first_order_position=first_order_position,
        )
        kept = tuple(one for one in table.segments if one.first_step < first_step)
        return replace(table, segments=(*kept, segment))
