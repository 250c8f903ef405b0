"""``plan_resume``: from what is asked for and what was found to what a launch will do."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from megatron.base.errors import ConfigError
from megatron.ledger.ledger_file import DatasetNote
from megatron.ledger.planning.component_ranges import cursors_at
from megatron.ledger.planning.continuation import (
    StreamPlan,
    continued_stream,
    first_segment,
    reordered_stream,
    resting_stream,
    same_samples,
)
from megatron.ledger.planning.costs import (
    Counting,
    Resume,
    adoption_checked,
    break_of_data,
    cost_under_neox,
)
from megatron.ledger.planning.data_changes import (
    Change,
    component_name,
    inexact_changes,
    stream_changes,
)
from megatron.ledger.planning.inputs import Found, StreamName, Wanted
from megatron.ledger.planning.past import Past
from megatron.ledger.planning.refusals import data_problem, misnamed_changes, schedule_problem
from megatron.ledger.planning.resume_plan import DataBreak, Kind, ResumePlan
from megatron.stream.order_description import OrderDescription

__all__ = ["plan_resume"]


def plan_resume(
    wanted: Wanted, found: Found | None, counting: Counting | None = None
) -> ResumePlan:
    """Decide what a launch does. Nothing is read or written but what ``counting`` opens.

    Args:
        wanted: what the configuration asks for.
        found: the checkpoint that is loaded; None: a new run from step 0.
        counting: how to look into the data; None: not at all.

    Raises:
        CheckpointError: the ledger contradicts itself.
        ConfigError: there is no training data.
    """
    if wanted.orders.get("train") is None:
        raise ConfigError("there is no training data to plan with")
    if found is None or wanted.finetune:
        return _plan_new(wanted, found)
    return _plan_continued(wanted, found, counting or Counting())


def _plan_new(wanted: Wanted, found: Found | None) -> ResumePlan:
    past = Past.of(found) if found is not None else None
    streams: dict[StreamName, StreamPlan] = {
        name: first_segment(order, batch_size=batch_size)
        for name, order, batch_size in _streams(wanted)
        if order is not None
    }
    misnamed = misnamed_changes(wanted)
    return ResumePlan(
        kind="refuse" if misnamed else "finetune" if past is not None else "new",
        step=0,
        train_iters=wanted.train_iters,
        source=found.path if found is not None else None,
        source_step=past.step if past is not None else None,
        run_id=past.run_id if past is not None else None,
        reason=found.reason if found is not None else "",
        streams=streams,
        orders=_orders(streams, {}),
        datasets=wanted.datasets,
        evaluates_first=False,
        notices=_notices(wanted, None, 0, wanted.datasets),
        problems=(misnamed,) if misnamed else (),
        passes=_passes(wanted, streams["train"], 0),
    )


def _plan_continued(wanted: Wanted, found: Found, counting: Counting) -> ResumePlan:
    past = Past.of(found)
    train = past.stream("train")
    if train is None:
        raise ConfigError(f"{found.path} tells of no training data that could be continued")
    inexact = inexact_changes(past, train, wanted)
    leaves_order = any(change.name != "tokenizer" for change in inexact)
    streams = _continued_streams(wanted, past, leaves_order=leaves_order)
    changes = (
        *inexact,
        *_changes_of_streams(wanted, past, streams),
        *_differences(found.without_effect, wanted.without_effect),
    )
    resume = Resume(wanted=wanted, past=past, train=train, plan=streams["train"], inexact=inexact)
    data_break = break_of_data(resume, counting)
    problems = _problems(wanted, found, inexact, data_break)
    neox, neox_notes = cost_under_neox(resume, counting)
    datasets = {**past.datasets, **wanted.datasets}
    accepted = past.accepted
    if data_break is not None and data_break.is_accepted:
        accepted = (*accepted, data_break.record(past.step))
    return ResumePlan(
        kind=_kind(past, changes, leaves_order=leaves_order, is_refused=bool(problems)),
        step=past.step,
        train_iters=wanted.train_iters,
        source=found.path,
        source_step=past.step,
        run_id=past.run_id,
        reason=found.reason,
        streams=streams,
        orders=_orders(streams, past.orders),
        datasets=datasets,
        evaluates_first=past.evaluation_due and "valid" in streams and streams["valid"].is_read,
        changes=changes,
        data_break=data_break,
        neox=neox,
        neox_notes=neox_notes,
        accepted=accepted,
        adopted=adoption_checked(past, train, counting),
        abandoned=_abandoned(found),
        numerics=_numerics(wanted, found),
        settings=tuple(
            f"{change.name} {change.detail}"
            for change in _differences(found.settings, wanted.settings)
        ),
        not_restored=(*_not_restored(wanted), *found.foreign_state),
        notices=(
            *_notices(wanted, found, past.step, datasets),
            *([] if leaves_order else _replaced(train.order, streams["train"].order)),
        ),
        problems=problems,
        passes=_passes(wanted, streams["train"], past.step),
    )


def _streams(wanted: Wanted) -> list[tuple[StreamName, OrderDescription | None, int]]:
    """Return each stream's order, None if nothing is read of it, and samples per step."""
    batch_size = wanted.train_batch_size
    names: tuple[tuple[StreamName, int], ...] = (
        ("train", batch_size),
        ("valid", wanted.eval_iters * batch_size),
        ("test", wanted.eval_iters * batch_size),
    )
    return [
        (name, wanted.orders.get(name) if per_step else None, per_step) for name, per_step in names
    ]


def _continued_streams(
    wanted: Wanted, past: Past, *, leaves_order: bool
) -> dict[StreamName, StreamPlan]:
    plans: dict[StreamName, StreamPlan] = {}
    for name, order, batch_size in _streams(wanted):
        stream = past.stream(name)
        if stream is None:
            if order is not None:
                plans[name] = first_segment(order, batch_size=batch_size)
        elif order is None:
            plans[name] = resting_stream(stream)
        elif (name == "train" and leaves_order) or not same_samples(stream.order, order):
            plans[name] = reordered_stream(stream, order, batch_size=batch_size)
        else:
            begin: Literal["head", "tail"] = "tail" if name == "train" else "head"
            plans[name] = continued_stream(
                stream, order, batch_size=batch_size, added_begin_with=begin
            )
    return plans


def _orders(
    plans: Mapping[StreamName, StreamPlan], earlier: Mapping[str, OrderDescription]
) -> dict[str, OrderDescription]:
    """Return what the segments name; orders that were planned and never begun are left out."""
    known = {**earlier, **{plan.order.order_id: plan.order for plan in plans.values()}}
    named = {segment.order_id for plan in plans.values() for segment in plan.state.segments}
    return {order_id: order for order_id, order in known.items() if order_id in named}


def _changes_of_streams(
    wanted: Wanted, past: Past, plans: Mapping[StreamName, StreamPlan]
) -> Iterator[Change]:
    for name, plan in plans.items():
        stream = past.stream(name)
        if stream is None:
            yield Change("stream", name, "is read from now on", "new segment")
        elif plan.is_read:
            yield from stream_changes(name, past, stream, plan, wanted)
        else:
            yield Change("stream", name, "is no longer read", "none")


def _differences(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[Change]:
    if before is None:
        return []
    return [
        Change(key, None, f"{before[key]} -> {value}", "none")
        for key, value in now.items()
        if key in before and before[key] != value
    ]


def _problems(
    wanted: Wanted, found: Found, inexact: Sequence[Change], data_break: DataBreak | None
) -> tuple[str, ...]:
    problems = (
        misnamed_changes(wanted),
        data_problem(wanted, found, inexact, data_break) if data_break is not None else None,
        schedule_problem(wanted, found),
    )
    return tuple(problem for problem in problems if problem is not None)


def _kind(past: Past, changes: Sequence[Change], *, leaves_order: bool, is_refused: bool) -> Kind:
    if is_refused:
        return "refuse"
    if past.run_id is None:
        return "adopt"
    if leaves_order or any(change.effect == "new segment" for change in changes):
        return "new_segment"
    return "continue"


def _abandoned(found: Found) -> tuple[int, int] | None:
    if found.newest_step is None or found.newest_step <= found.step:
        return None
    return (found.step + 1, found.newest_step)


def _numerics(wanted: Wanted, found: Found) -> tuple[str, ...]:
    if found.numerics is None:
        return ("topology and software of the checkpoint are not known",)
    return tuple(
        f"{change.name} {change.detail}" for change in _differences(found.numerics, wanted.numerics)
    )


def _not_restored(wanted: Wanted) -> tuple[str, ...]:
    keys = {
        "no_load_optim": wanted.restores_optimizer,
        "no_load_rng": wanted.restores_random_state,
    }
    return tuple(key for key, is_restored in keys.items() if not is_restored)


def _notices(
    wanted: Wanted, found: Found | None, step: int, datasets: Mapping[str, DatasetNote]
) -> tuple[str, ...]:
    notices = []
    if wanted.division is not None:
        before = None if found is None else found.division
        notices.append(_divided(wanted.train_batch_size, wanted.division, before))
    if not wanted.is_recorded:
        notices.append("nothing is recorded: save is not set")
    if wanted.train_iters <= step:
        notices.append(f"no step is left: train_iters is {wanted.train_iters}")
    sampled = sorted(note.path for note in datasets.values() if note.level == "sampled")
    if sampled:
        notices.append(
            f"known by samples of their bytes only: {', '.join(sampled)}; "
            "`neox-ledger verify --full` reads all of them"
        )
    partial = sorted(note.path for note in datasets.values() if note.level == "index")
    if partial:
        notices.append(f"known by the index and the token files there: {', '.join(partial)}")
    return (*notices, *wanted.notices)


def _replaced(before: OrderDescription, now: OrderDescription) -> list[str]:
    """Warn of data that may be the old one in a new place: content alone can't tell."""
    if {one.dataset for one in before.components} & {one.dataset for one in now.components}:
        return []
    return [
        "no dataset read so far is read any more. If the new data is the old one, corrected, what "
        "was read of it comes again; at the old path that would be counted and refused"
    ]


def _divided(batch: int, now: tuple[int, int, int], before: tuple[int, int, int] | None) -> str:
    micro, accumulation, ranks = now
    text = (
        f"elastic_batch: {batch} samples = micro batch {micro} x accumulation {accumulation} x "
        f"{ranks} data-parallel ranks"
    )
    if before in (None, now):
        return text
    return f"{text} (was {' x '.join(map(str, before or ()))})"


def _passes(wanted: Wanted, train: StreamPlan, step: int) -> dict[str, float]:
    if wanted.train_epochs is None:
        return {}
    remaining = max(0, wanted.train_iters - step) * wanted.train_batch_size
    cursors = cursors_at(train.order, train.order_position + remaining)
    return {
        component_name(component, wanted.datasets, train.order): cursors[component.key]
        / wanted.epoch_samples[component.key]
        for component in train.order.components
        if component.key in wanted.epoch_samples
    }
