"""Whether a new order of a lineage goes on where the ones before it were left: no gap, no overlap.

Inside of a segment every position is consumed once by construction. Where one ends, each component
of the next must begin at its own cursor; only a change that was accepted may do otherwise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.ledger.ledger_file import AcceptedChange, Ledger
from megatron.ledger.planning.component_ranges import cursors_at
from megatron.ledger.planning.continuation import same_samples

__all__ = ["Discontinuity", "discontinuities", "unreached"]


@dataclass(frozen=True)
class Discontinuity:
    """A component that doesn't go on from its cursor."""

    stream: str
    step: int  # first step of the segment
    component: str  # key
    cursor: int  # where it was left
    begins_at: int  # where it goes on

    @property
    def text(self) -> str:
        """Say what that means."""
        difference = self.begins_at - self.cursor
        what = "skipped" if difference > 0 else "repeated"
        return (
            f"the segment of the {self.stream} stream from step {self.step} on begins with sample "
            f"{self.begins_at} of {self.component}, which was left at {self.cursor}: "
            f"{abs(difference)} samples are {what}"
        )


def unreached(ledger: Ledger) -> Iterator[str]:
    """Yield where a checkpoint's training stream wouldn't go on behind its last step."""
    state = ledger.streams["train"]
    if not state.segments.segments:
        return
    expected = state.segments.positions(ledger.step + 1).start
    if state.next_position != expected:
        yield (
            f"the train stream goes on at position {state.next_position}, but step {ledger.step} "
            f"ended before {expected}"
        )
        return
    for name, stream in ledger.streams.items():
        segment = stream.segments.segments[-1]
        order = ledger.orders[segment.order_id]
        position = max(stream.next_position, segment.first_position)
        for key, cursor in cursors_at(order, segment.order_position(position)).items():
            noted = stream.cursors.get(key)
            if noted is not None and noted != cursor:
                yield (
                    f"the {name} stream goes on at position {stream.next_position}, where {key} is "
                    f"at its sample {cursor}, but its cursor is noted as {noted}"
                )


def discontinuities(ledger: Ledger, stream: str) -> Iterator[Discontinuity]:
    """Yield what doesn't go on from its cursor though nobody accepted that, in order of steps."""
    state = ledger.streams[stream]
    segments = tuple(state.segments)
    ends = [*(segment.first_position for segment in segments[1:]), state.next_position]
    cursors: dict[str, int] = {}
    previous = None
    for segment, end in zip(segments, ends, strict=True):
        order = ledger.orders[segment.order_id]
        if previous is None:
            is_continued = True
        elif stream == "train":
            is_continued = not _was_accepted(ledger.accepted, segment.first_step)
        else:  # evaluations may leave an order unasked
            is_continued = same_samples(previous, order)
        begins = cursors_at(order, segment.first_order_position)
        for key, begin in begins.items() if is_continued else ():
            if begin != cursors.get(key, 0):
                yield Discontinuity(stream, segment.first_step, key, cursors.get(key, 0), begin)
        if not is_continued:
            cursors = {}
        cursors |= cursors_at(order, segment.order_position(max(end, segment.first_position)))
        previous = order


def _was_accepted(changes: Sequence[AcceptedChange], first_step: int) -> bool:
    return any(change.after_step == first_step - 1 for change in changes)
