"""What NeoX would do at the same resume, and what that repeats and skips.

NeoX keeps no count of samples. It builds the order of the new configuration as if the run began
with it, and enters it at iteration x train_batch_size: right as long as neither the batch size nor
the order changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.base.errors import MegatronError
from megatron.ledger.planning.component_ranges import ComponentRange, component_ranges
from megatron.ledger.planning.inputs import OpenOrder
from megatron.ledger.planning.token_counts import CannotCountError, Comparison, compare
from megatron.stream.order_description import ComponentDescription, OrderDescription

__all__ = ["NeoxRule", "neox_rule", "neox_validation_start"]


@dataclass(frozen=True)
class NeoxRule:
    """NeoX's way, compared with the exact one."""

    first_sample: int  # of the order it would build
    consumed_samples: int  # what a count would have said
    has_new_order: bool  # index maps of a dataset, or draws of the blend, are other ones
    comparison: Comparison | None  # None: not counted
    not_counted: str = ""  # why

    @property
    def is_exact(self) -> bool:
        """Whether NeoX would read what an exact continuation reads."""
        return self.comparison is not None and not self.comparison


def neox_rule(
    order: OrderDescription,
    exact: Sequence[ComponentRange],
    *,
    step: int,
    consumed_samples: int,
    batch_size: int,
    num_steps: int,
    known: Sequence[ComponentDescription],
    exact_seq_length: int,
    open_order: OpenOrder | None,
    is_unlimited: bool = False,
) -> NeoxRule:
    """Compare NeoX's continuation with the exact one over the next ``num_steps`` steps.

    A component whose samples stand in the same order for both differs only by where it is entered:
    what lies between is repeated or skipped, whenever the run ends. Of other components every token
    is counted up to the end of the run.

    Args:
        order: what a new run of the configuration would read.
        exact: what the exact continuation reads.
        step: steps done.
        consumed_samples: samples they took.
        batch_size: configured now.
        num_steps: steps that remain.
        known: components the run has read.
        exact_seq_length: of ``exact``.
        open_order: opens a component's order; None: only what needs no data is counted.
        is_unlimited: count however long it takes.
    """
    first = step * batch_size
    theirs = component_ranges(order, first, first + num_steps * batch_size)
    try:
        before, after, has_new_order = _differences(exact, theirs, open_order)
        comparison = compare(
            before,
            after,
            known=known,
            seq_lengths=(exact_seq_length, order.seq_length),
            open_order=open_order,
            is_unlimited=is_unlimited,
        )
    except CannotCountError as error:
        return NeoxRule(first, consumed_samples, True, None, str(error))
    return NeoxRule(first, consumed_samples, has_new_order, comparison)


def neox_validation_start(
    *, step: int, gradient_accumulation_steps: int, eval_interval: int, eval_iters: int
) -> int:
    """Return the micro batch of the validation data at which NeoX goes on."""
    return step * gradient_accumulation_steps // eval_interval * eval_iters


def _differences(
    exact: Sequence[ComponentRange], theirs: Sequence[ComponentRange], open_order: OpenOrder | None
) -> tuple[list[ComponentRange], list[ComponentRange], bool]:
    """Return what only the exact continuation reads, what only NeoX does, and if orders differ."""
    ours = {one.component.key: one for one in exact}
    before, after = [], []
    has_new_order = False
    for their in theirs:
        our = ours.pop(their.component.key, None)
        pieces = _wrapped(their, open_order)
        if our is None or our.order != their.order or len(pieces) > 1:
            has_new_order |= our is None or our.order != their.order
            before += [our] if our is not None else []
            after += pieces
        elif their.start < our.start:
            after.append(replace(their, stop=min(our.start, their.stop)))
        elif their.start > our.start:
            before.append(replace(our, stop=their.start))
    return before + list(ours.values()), after, has_new_order


def _wrapped(their: ComponentRange, open_order: OpenOrder | None) -> list[ComponentRange]:
    """Start over at the end of the index maps, as NeoX does with a dataset drawn past it."""
    if open_order is None:
        return [their]
    try:
        length = open_order(their.order).head_length
    except MegatronError:
        return [their]
    if length == 0 or their.stop <= length:
        return [their]
    pieces = []
    start, stop = their.start, their.stop
    while start < stop:
        end = min((start // length + 1) * length, stop)
        pieces.append(replace(their, start=start % length, stop=(end - 1) % length + 1))
        start = end
    return pieces
