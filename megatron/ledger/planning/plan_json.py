"""A plan as JSON, for scripts: ``neox-ledger explain --json``.

Members are only ever added; ``format`` is raised when one changes its meaning.

    format            1
    kind              new | finetune | continue | new_segment | adopt | refuse
    exit_status       0 goes ahead, 1 refused, 2 goes ahead at a cost that could not be counted
    source, source_step, run_id   checkpoint loaded, its step, its run; null: none, or not known
    reason            why this checkpoint is loaded; may be empty
    next_step, train_iters        first and last step of this launch
    data_exactness, numbers_exactness   a sentence each
    evaluates_first   whether the evaluation due at the checkpoint is made before the next step
    changes           list of {name, stream (null: the whole run), detail, effect}
    streams           by name: {next_step, next_position, order_id, order_position, is_read,
                      segments: list of {first_step, batch_size, first_position, order_id,
                      first_order_position}, cursors: {component key: next sample}}
    orders            by order_id, as in ledger.json
    datasets          by identity: {path, level, num_documents, num_tokens, companions}
    data_break        null, or {keys, is_accepted, horizon_step, enters_at, neox_enters_at,
                      counts, not_counted}
    neox              null, or {first_sample, consumed_samples, has_new_order, counts, not_counted}
    counts            null, or {repeated, skipped, new}, each {tokens, documents, samples};
                      documents is null if the content is no longer there
    abandoned         null, or [first step, last step]
    adopted           null, or {source, step, assumed}
    numerics          list: differences that change rounding
    settings          list: changed keys that a step computes with
    not_restored, neox_notes, notices, problems   lists of sentences
    passes            by dataset: passes by train_iters, under train_epochs
"""

from dataclasses import asdict
from typing import Any

from megatron.ledger.planning.continuation import StreamPlan
from megatron.ledger.planning.resume_plan import ResumePlan
from megatron.ledger.planning.token_counts import Comparison

__all__ = ["FORMAT", "plan_to_json"]

FORMAT = 1


def plan_to_json(plan: ResumePlan) -> dict[str, Any]:
    """Return plain values; the module's docstring says what they mean."""
    data_break, neox = plan.data_break, plan.neox
    return {
        "format": FORMAT,
        "kind": plan.kind,
        "exit_status": plan.exit_status,
        "source": plan.source,
        "source_step": plan.source_step,
        "run_id": plan.run_id,
        "reason": plan.reason,
        "next_step": plan.next_step,
        "train_iters": plan.train_iters,
        "data_exactness": plan.data_exactness,
        "numbers_exactness": plan.numbers_exactness,
        "evaluates_first": plan.evaluates_first,
        "changes": [asdict(change) for change in plan.changes],
        "streams": {name: _stream(stream) for name, stream in plan.streams.items()},
        "orders": {name: order.to_json() for name, order in plan.orders.items()},
        "datasets": {name: asdict(note) for name, note in plan.datasets.items()},
        "data_break": None
        if data_break is None
        else {
            "keys": list(data_break.keys),
            "is_accepted": data_break.is_accepted,
            "horizon_step": data_break.horizon_step,
            "enters_at": data_break.enters_at,
            "neox_enters_at": data_break.neox_enters_at,
            "counts": _counts(data_break.comparison),
            "not_counted": data_break.not_counted,
        },
        "neox": None
        if neox is None
        else {
            "first_sample": neox.first_sample,
            "consumed_samples": neox.consumed_samples,
            "has_new_order": neox.has_new_order,
            "counts": _counts(neox.comparison),
            "not_counted": neox.not_counted,
        },
        "neox_notes": list(plan.neox_notes),
        "abandoned": None if plan.abandoned is None else list(plan.abandoned),
        "adopted": None if plan.adopted is None else asdict(plan.adopted),
        "numerics": list(plan.numerics),
        "settings": list(plan.settings),
        "not_restored": list(plan.not_restored),
        "notices": list(plan.notices),
        "problems": list(plan.problems),
        "passes": dict(plan.passes),
    }


def _stream(stream: StreamPlan) -> dict[str, Any]:
    return {
        "next_step": stream.next_step,
        "next_position": stream.state.next_position,
        "order_id": stream.order.order_id,
        "order_position": stream.order_position,
        "is_read": stream.is_read,
        "segments": [asdict(segment) for segment in stream.state.segments],
        "cursors": dict(stream.state.cursors),
    }


def _counts(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None:
        return None
    return {
        name: {"tokens": part.tokens, "documents": part.documents, "samples": part.samples}
        for name, part in comparison.parts.items()
    }
