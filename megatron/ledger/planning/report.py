"""A plan in words: five lines for the launcher, everything for ``neox-ledger explain``."""

from collections.abc import Iterator

from megatron.ledger.planning.data_changes import component_name
from megatron.ledger.planning.neox_rule import NeoxRule
from megatron.ledger.planning.resume_plan import DataBreak, ResumePlan
from megatron.ledger.planning.token_counts import Comparison
from megatron.stream.order_description import OrderDescription

__all__ = ["report_lines", "summary_lines"]

_CHANGES_IN_SUMMARY = 4
_LABEL_WIDTH = 11


def summary_lines(plan: ResumePlan) -> list[str]:
    """Return the five lines that a launch prints before anything is built."""
    remarks = [
        *([plan.reason] if plan.reason else []),
        *([f"the evaluation due after step {plan.step} comes first"] * plan.evaluates_first),
        *_course(plan),
        *plan.notices,
    ]
    return [
        _labelled("plan", _what(plan)),
        _labelled("data", _where(plan)),
        _labelled("changed", _changed(plan)),
        _labelled("exactness", f"data {plan.data_exactness}; numbers {plan.numbers_exactness}"),
        _labelled("note", "; ".join(remarks) or _next_evaluation(plan)),
    ]


def report_lines(plan: ResumePlan) -> list[str]:
    """Return all there is to say of a plan."""
    lines = summary_lines(plan)
    sections = {
        "What changed": _change_lines(plan),
        "Streams": _stream_lines(plan),
        "Orders": _order_lines(plan),
        "What the change of data costs": _break_lines(plan.data_break),
        "NeoX would": _neox_lines(plan),
        "Assumed of the adopted checkpoint": plan.adopted.assumed if plan.adopted else (),
        f"Passes over each dataset by step {plan.train_iters}": [
            f"{name}: {passes:.2f}" for name, passes in plan.passes.items()
        ],
        "Refused": [line for problem in plan.problems for line in problem.splitlines()],
    }
    for title, content in sections.items():
        body = [f"  {line}" for line in content]
        if body:
            lines += ["", title, *body]
    return lines


def _labelled(label: str, text: str) -> str:
    return f"{label:<{_LABEL_WIDTH}}{text}"


def _what(plan: ResumePlan) -> str:
    steps = f"steps {plan.next_step}..{plan.train_iters}"
    if plan.next_step > plan.train_iters:
        steps = f"no step, train_iters is {plan.train_iters}"
    match plan.kind:
        case "new":
            return f"a new run, {steps}"
        case "finetune":
            return f"a new run with the weights of {plan.source}, {steps}"
        case "refuse" if plan.source is None:
            return "refused"
        case "refuse":
            return f"refused: {plan.source} would not go on as configured"
        case "adopt":
            return f"adopts {plan.source}, which has no ledger, and goes on with {steps}"
    return f"continues {plan.source} (run {plan.run_id}) with {steps}"


def _where(plan: ResumePlan) -> str:
    train = plan.train
    return (
        f"step {plan.next_step} begins at position {train.state.next_position:,}, sample "
        f"{train.order_position:,} of order {train.order.order_id[:12]}; "
        f"{train.batch_size:,} samples per step"
    )


def _changed(plan: ResumePlan) -> str:
    changes = [str(change) for change in plan.changes]
    more = len(changes) - _CHANGES_IN_SUMMARY
    shown = changes[:_CHANGES_IN_SUMMARY] + ([f"{more} more"] if more > 0 else [])
    return "; ".join(shown) or "nothing"


def _course(plan: ResumePlan) -> Iterator[str]:
    if plan.abandoned is not None:
        first, last = plan.abandoned
        yield f"steps {first}..{last} were taken before and stay as an abandoned branch"


def _next_evaluation(plan: ResumePlan) -> str:
    valid = plan.streams.get("valid")
    if valid is None or not valid.is_read:
        return "no validation data is read"
    return (
        f"evaluation {valid.next_step} comes next, at validation position "
        f"{valid.state.next_position:,}"
    )


def _change_lines(plan: ResumePlan) -> list[str]:
    effects = {
        "none": "no effect on the samples",
        "new segment": f"from step {plan.next_step} on, exact",
        "no exact continuation": "no exact continuation",
    }
    lines = [f"{change}: {effects[change.effect]}" for change in plan.changes]
    lines += [f"{one}: other numbers from step {plan.next_step} on" for one in plan.settings]
    return lines + [f"{one}: numbers equal to rounding" for one in plan.numerics]


def _stream_lines(plan: ResumePlan) -> Iterator[str]:
    for name, stream in plan.streams.items():
        unit = "step" if name == "train" else "evaluation"
        rest = "" if stream.is_read else " (not read now)"
        yield f"{name}: {unit} {stream.next_step} at position {stream.state.next_position:,}{rest}"
        for segment in stream.state.segments:
            yield (
                f"  from {unit} {segment.first_step:,}: {segment.batch_size:,} samples each, "
                f"position {segment.first_position:,} is sample {segment.first_order_position:,} "
                f"of order {segment.order_id[:12]}"
            )


def _order_lines(plan: ResumePlan) -> Iterator[str]:
    current = {stream.order.order_id: name for name, stream in plan.streams.items()}
    for order_id, name in current.items():
        order = plan.orders[order_id]
        yield (
            f"{order_id} ({name}): seq_length {order.seq_length}, seed {order.seed}, "
            f"{order.packing}"
        )
        yield from _component_lines(plan, order)


def _component_lines(plan: ResumePlan, order: OrderDescription) -> Iterator[str]:
    weights = order.weights or (1.0,) * len(order.components)
    for component, weight in zip(order.components, weights, strict=True):
        begin = "NeoX's head"
        if component == component.without_head():
            begin = "its first tail block"
        elif component.start:
            begin = f"its sample {component.start:,}"
        name = component_name(component, plan.datasets, order)
        yield f"  {name}: weight {weight:.6g}, from {begin}, content {component.dataset[:12]}"


def _break_lines(data_break: DataBreak | None) -> Iterator[str]:
    if data_break is None:
        return
    if data_break.comparison is None:
        yield f"not counted: {data_break.not_counted}"
        yield f"at most, up to step {data_break.horizon_step}:"
    else:
        yield f"up to step {data_break.horizon_step}, compared with the undisturbed order:"
    yield from _comparison_lines(data_break.comparison or data_break.at_most)
    yield (
        f"the order is entered at its sample {data_break.enters_at:,}, after as many tokens as "
        f"were consumed (NeoX: {data_break.neox_enters_at:,}, step times train_batch_size)"
    )


def _comparison_lines(comparison: Comparison) -> Iterator[str]:
    for name, quantity in comparison.parts.items():
        yield f"  {name:<9}{quantity}"


def _neox_lines(plan: ResumePlan) -> Iterator[str]:
    rule = plan.neox
    if rule is None:
        return
    yield from _rule_lines(plan, rule)
    yield from plan.neox_notes


def _rule_lines(plan: ResumePlan, rule: NeoxRule) -> Iterator[str]:
    start = (
        f"go on at sample {rule.first_sample:,} ({plan.step:,} steps x "
        f"{plan.train.batch_size:,}); {rule.consumed_samples:,} are consumed"
    )
    if rule.has_new_order:
        start += ", in another order"
    yield start
    if rule.comparison is None:
        yield f"not counted: {rule.not_counted}"
    elif rule.is_exact:
        yield "repeat nothing and skip nothing"
    else:
        yield from _comparison_lines(rule.comparison)
