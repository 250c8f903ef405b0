"""How one stream goes on under what is asked for now: in which order, from which position."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from megatron.ledger.ledger_file import StreamState
from megatron.ledger.planning.component_ranges import cursors_at
from megatron.ledger.planning.past import StreamPast
from megatron.stream.order_description import ComponentDescription, OrderDescription
from megatron.stream.segments import Segment, SegmentTable

__all__ = [
    "StreamPlan",
    "chops_documents",
    "continued_stream",
    "first_segment",
    "reordered_stream",
    "resting_stream",
    "same_samples",
]


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """Where a stream goes on, and all that led there."""

    state: StreamState
    """With the segment of the next step. The cursors are those at ``next_position``, also of
    components that are not drawn from now: a checkpoint keeps them and updates the others."""
    order: OrderDescription  # of the next step
    order_position: int  # where the order goes on
    next_step: int  # for evaluation streams the next evaluation
    is_read: bool = True  # False: the configuration reads nothing of it now


def first_segment(order: OrderDescription, *, batch_size: int) -> StreamPlan:
    """Return a stream that nothing was read from yet."""
    segment = Segment(
        first_step=1,
        batch_size=batch_size,
        first_position=0,
        order_id=order.order_id,
        first_order_position=0,
    )
    state = StreamState(
        segments=SegmentTable((segment,)), next_position=0, cursors=cursors_at(order, 0)
    )
    return StreamPlan(state=state, order=order, order_position=0, next_step=1)


def resting_stream(past: StreamPast) -> StreamPlan:
    """Return a stream that isn't read now; its cursors wait until it is again."""
    return StreamPlan(
        state=past.state,
        order=past.order,
        order_position=past.order_position,
        next_step=past.steps_done + 1,
        is_read=False,
    )


def chops_documents(order: OrderDescription) -> bool:
    """Whether long documents are cut; packed samples always do, so the key has no effect there."""
    return order.allow_chopped or order.packing in ("packed", "sequential")


def same_samples(one: OrderDescription, other: OrderDescription) -> bool:
    """Whether equal components give equal samples in both."""
    sides = [
        (order.seed, order.seq_length, order.packing, chops_documents(order))
        for order in (one, other)
    ]
    return sides[0] == sides[1]


def continued_stream(
    past: StreamPast,
    wanted: OrderDescription,
    *,
    batch_size: int,
    added_begin_with: Literal["head", "tail"],
) -> StreamPlan:
    """Go on with every component from its own cursor.

    The order stays the same as long as its components and weights do, whatever the head of a new
    run would be; otherwise a blend of the wanted components begins, whose draws count from here.

    Args:
        past: the stream so far, of samples like those wanted.
        wanted: the order of a new run.
        batch_size: samples per step, or per evaluation.
        added_begin_with: how a component starts that was never drawn from: with NeoX's head, or
            with the first tail block.
    """
    previous = past.order
    if _is_same_blend(previous, wanted):
        return _entered(past, previous, past.order_position, batch_size, past.state.cursors)
    components = tuple(
        _continued_component(past, component, added_begin_with) for component in wanted.components
    )
    order = replace(previous, components=components, weights=wanted.weights)
    return _entered(past, order, 0, batch_size, past.state.cursors)


def reordered_stream(past: StreamPast, wanted: OrderDescription, *, batch_size: int) -> StreamPlan:
    """Enter a new run's order after as many tokens as were consumed: no exact continuation."""
    position = past.consumed_tokens // wanted.seq_length
    return _entered(past, wanted, position, batch_size, kept_cursors={})


def _is_same_blend(one: OrderDescription, other: OrderDescription) -> bool:
    keys = [[component.key for component in order.components] for order in (one, other)]
    return keys[0] == keys[1] and (len(keys[0]) == 1 or one.weights == other.weights)


def _continued_component(
    past: StreamPast, wanted: ComponentDescription, added_begin_with: Literal["head", "tail"]
) -> ComponentDescription:
    cursor = past.state.cursors.get(wanted.key)
    if cursor is not None:
        return wanted.continued(past.component(wanted.key), cursor)
    return wanted if added_begin_with == "head" else wanted.without_head()


def _entered(
    past: StreamPast,
    order: OrderDescription,
    order_position: int,
    batch_size: int,
    kept_cursors: Mapping[str, int],
) -> StreamPlan:
    done = past.steps_done
    table = past.state.segments.followed_by(
        after_step=done,
        batch_size=batch_size,
        order_id=order.order_id,
        first_order_position=order_position,
    )
    # A component may have been planned and dropped again before its first step.
    orders = {**past.orders, order.order_id: order}
    drawn = {one.key for segment in table for one in orders[segment.order_id].components}
    kept = {key: cursor for key, cursor in kept_cursors.items() if key in drawn}
    cursors = {**kept, **cursors_at(order, order_position)}
    state = StreamState(segments=table, next_position=past.state.next_position, cursors=cursors)
    return StreamPlan(state=state, order=order, order_position=order_position, next_step=done + 1)
