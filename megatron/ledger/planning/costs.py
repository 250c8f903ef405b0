"""What a resume costs: samples repeated and skipped, by our way and by NeoX's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.base.errors import MegatronError
from megatron.ledger.ledger_file import Adoption
from megatron.ledger.planning.component_ranges import ComponentRange, component_ranges
from megatron.ledger.planning.continuation import StreamPlan
from megatron.ledger.planning.data_changes import Change, component_name
from megatron.ledger.planning.inputs import OpenOrder, Wanted
from megatron.ledger.planning.neox_rule import NeoxRule, neox_rule, neox_validation_start
from megatron.ledger.planning.past import Past, StreamPast
from megatron.ledger.planning.resume_plan import DataBreak
from megatron.ledger.planning.token_counts import CannotCountError, Comparison, Quantity, compare
from megatron.stream.order_description import OrderDescription

__all__ = ["Counting", "adoption_checked", "break_of_data", "cost_under_neox"]


@dataclass(frozen=True, kw_only=True)
class Counting:
    """How far planning looks into the data."""

    open_order: OpenOrder | None = None  # None: only arithmetic
    counts_neox: bool = False  # also NeoX's way; a change without continuation is always counted
    is_unlimited: bool = False  # count however many samples there are


@dataclass(frozen=True, kw_only=True)
class Resume:
    """The training data of a resume: before, now, and what separates them."""

    wanted: Wanted
    past: Past
    train: StreamPast
    plan: StreamPlan  # how the training stream goes on
    inexact: Sequence[Change]  # changes without an exact continuation

    @property
    def leaves_order(self) -> bool:
        """Whether other samples come from here on: a tokenizer alone changes none."""
        return any(change.name != "tokenizer" for change in self.inexact)

    @property
    def remaining_samples(self) -> int:
        """Samples up to the configured train_iters."""
        return max(0, self.wanted.train_iters - self.past.step) * self.wanted.train_batch_size

    def undisturbed(self) -> list[ComponentRange]:
        """Return what the old order would go on with."""
        start = self.train.order_position
        return component_ranges(self.train.order, start, start + self.remaining_samples)

    def planned(self) -> list[ComponentRange]:
        """Return what is read instead, or just as well."""
        start = self.plan.order_position
        return component_ranges(self.plan.order, start, start + self.remaining_samples)


def break_of_data(resume: Resume, counting: Counting) -> DataBreak | None:
    """Count what changes cost that have no exact continuation; None if there are none.

    The undisturbed order goes on from where it is, with the configured batch size, to the
    configured train_iters.
    """
    if not resume.inexact:
        return None
    wanted, before, after = resume.wanted, resume.train.order, resume.plan.order
    keys = tuple(change.name for change in resume.inexact)
    comparison, not_counted = None, ""
    if resume.leaves_order:
        at_most = _at_most(before, after, resume.remaining_samples)
        try:
            comparison = compare(
                resume.undisturbed(),
                resume.planned(),
                known=before.components,
                seq_lengths=(before.seq_length, after.seq_length),
                open_order=counting.open_order,
                is_unlimited=counting.is_unlimited,
            )
        except CannotCountError as error:
            not_counted = str(error)
    else:
        comparison = at_most = _at_most(before, after, 0)
    return DataBreak(
        keys=keys,
        is_accepted=set(keys) <= wanted.accept_data_change,
        horizon_step=max(resume.past.step, wanted.train_iters),
        enters_at=resume.plan.order_position,
        neox_enters_at=resume.past.step * wanted.train_batch_size,
        comparison=comparison,
        at_most=at_most,
        not_counted=not_counted,
    )


def cost_under_neox(resume: Resume, counting: Counting) -> tuple[NeoxRule | None, tuple[str, ...]]:
    """Return what NeoX would do at this resume, counted if asked for, and remarks on it."""
    wanted, past, train = resume.wanted, resume.past, resume.train
    order = wanted.orders["train"]
    if not counting.counts_neox or order is None:
        return None, ()
    rule = neox_rule(
        order,
        resume.undisturbed() if resume.leaves_order else resume.planned(),
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
    if {change.name for change in resume.inexact} & {"split", "data"}:
        remarks.append(
            "NeoX doesn't compare index maps with the data: maps of this name, if there are any, "
            "would be used as they are, and the numbers above would not hold"
        )
    validation = _validation_remark(wanted, past)
    if validation is not None:
        remarks.append(validation)
    return rule, tuple(remarks)


def adoption_checked(past: Past, train: StreamPast, counting: Counting) -> Adoption | None:
    """Say of an adopted run, if so, that it read on where NeoX's index maps had ended."""
    adopted, open_order = past.adopted, counting.open_order
    if adopted is None or past.run_id is not None or open_order is None:
        return adopted
    sentences = []
    for one in component_ranges(train.order, 0, train.order_position):
        name = component_name(one.component, past.datasets, train.order)
        try:
            length = open_order(one.order).head_length
        except MegatronError as error:
            sentences.append(f"{name}: NeoX's index maps went as far as it was read ({error})")
            continue
        if one.stop > length:
            sentences.append(
                f"{one.stop - length} samples of {name} came after the {length} of NeoX's index "
                "maps, from a new epoch; NeoX starts over there"
            )
    return replace(adopted, assumed=(*adopted.assumed, *sentences))


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
