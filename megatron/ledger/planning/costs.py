"""What a resume costs: samples repeated and skipped, by our way and by NeoX's."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.ledger.planning.component_ranges import ComponentRange, component_ranges
from megatron.ledger.planning.continuation import StreamPlan
from megatron.ledger.planning.data_changes import Change
from megatron.ledger.planning.inputs import OpenOrder, Wanted
from megatron.ledger.planning.neox_rule import NeoxRule, neox_rule, neox_validation_start
from megatron.ledger.planning.past import Past, StreamPast
from megatron.ledger.planning.resume_plan import DataBreak
from megatron.ledger.planning.token_counts import CannotCountError, Comparison, Quantity, compare
from megatron.stream.order_description import OrderDescription

__all__ = ["Counting", "break_of_data", "cost_under_neox"]


@dataclass(frozen=True, kw_only=True)
class Counting:
    """How far planning looks into the data."""

    open_order: OpenOrder | None = None  # None: only arithmetic
    counts_neox: bool = False  # also NeoX's way; a change without continuation is always counted
    is_unlimited: bool = False  # count however many samples there are


def break_of_data(
    wanted: Wanted,
    past: Past,
    train: StreamPast,
    plan: StreamPlan,
    changes: Sequence[Change],
    counting: Counting,
) -> DataBreak | None:
    """Count what changes cost that have no exact continuation; None if there are none.

    The undisturbed order goes on from where it is, with the configured batch size, to the
    configured train_iters.
    """
    if not changes:
        return None
    keys = tuple(change.name for change in changes)
    remaining = _remaining_samples(wanted, past.step)
    comparison, not_counted = None, ""
    at_most = _at_most(train.order, plan.order, remaining)
    if keys == ("tokenizer",):  # the same samples in the same order
        comparison = at_most = _at_most(train.order, plan.order, 0)
    else:
        try:
            comparison = compare(
                _undisturbed(train, remaining),
                component_ranges(plan.order, plan.order_position, plan.order_position + remaining),
                known=train.order.components,
                seq_lengths=(train.order.seq_length, plan.order.seq_length),
                open_order=counting.open_order,
                is_unlimited=counting.is_unlimited,
            )
        except CannotCountError as error:
            not_counted = str(error)
    return DataBreak(
        keys=keys,
        is_accepted=set(keys) <= wanted.accept_data_change,
        horizon_step=max(past.step, wanted.train_iters),
        enters_at=plan.order_position,
        neox_enters_at=past.step * wanted.train_batch_size,
        comparison=comparison,
        at_most=at_most,
        not_counted=not_counted,
    )


def cost_under_neox(
    wanted: Wanted,
    past: Past,
    train: StreamPast,
    plan: StreamPlan,
    inexact: Sequence[Change],
    counting: Counting,
) -> tuple[NeoxRule | None, tuple[str, ...]]:
    """Return what NeoX would do at this resume, counted if asked for, and remarks on it."""
    order = wanted.orders["train"]
    if not counting.counts_neox or order is None:
        return None, ()
    remaining = _remaining_samples(wanted, past.step)
    leaves_order = any(change.name != "tokenizer" for change in inexact)
    exact = (
        _undisturbed(train, remaining)
        if leaves_order
        else component_ranges(plan.order, plan.order_position, plan.order_position + remaining)
    )
    rule = neox_rule(
        order,
        exact,
        step=past.step,
        consumed_samples=train.state.next_position,
        batch_size=wanted.train_batch_size,
        num_steps=max(0, wanted.train_iters - past.step),
        known=train.components_read,
        exact_seq_length=train.order.seq_length,
        open_order=counting.open_order,
        is_unlimited=counting.is_unlimited,
    )
    remarks = []
    if {change.name for change in inexact} & {"split", "data"}:
        remarks.append(
            "NeoX doesn't compare index maps with the data: maps of this name, if there are any, "
            "would be used as they are, and the numbers above would not hold"
        )
    validation = _validation_remark(wanted, past)
    if validation is not None:
        remarks.append(validation)
    return rule, tuple(remarks)


def _at_most(before: OrderDescription, after: OrderDescription, num_samples: int) -> Comparison:
    skipped, added = (
        Quantity(
            tokens=num_samples * order.seq_length,
            documents=sum(len(one.documents) for one in order.components) if num_samples else 0,
            seq_length=order.seq_length,
        )
        for order in (before, after)
    )
    return Comparison(repeated=added, skipped=skipped, new=added)


def _undisturbed(train: StreamPast, num_samples: int) -> list[ComponentRange]:
    start = train.order_position
    return component_ranges(train.order, start, start + num_samples)


def _remaining_samples(wanted: Wanted, step: int) -> int:
    return max(0, wanted.train_iters - step) * wanted.train_batch_size


def _validation_remark(wanted: Wanted, past: Past) -> str | None:
    stream = past.stream("valid")
    if stream is None or not wanted.eval_interval or not wanted.eval_iters:
        return None
    micro_batch = neox_validation_start(
        step=past.step,
        gradient_accumulation_steps=wanted.gradient_accumulation_steps,
        eval_interval=wanted.eval_interval,
        eval_iters=wanted.eval_iters,
    )
    sample = micro_batch * wanted.train_batch_size // wanted.gradient_accumulation_steps
    consumed = stream.state.next_position
    if sample == consumed:
        return None
    return (
        f"validation: NeoX would go on at sample {sample:,} (micro batch {micro_batch:,}), "
        f"{consumed:,} were consumed"
    )
