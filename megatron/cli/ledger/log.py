"""``neox-ledger log``: the attempts of a run as a tree, and the segments of its streams."""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from megatron.cli.ledger.options import add_json_option, add_run_option, opened_run
from megatron.cli.ledger.output import number, print_json, print_table, say
from megatron.ledger.planning.data_changes import component_name
from megatron.ledger.queries.history import AttemptNode, history
from megatron.ledger.queries.run_view import RunView
from megatron.stream.order_description import OrderDescription

EPILOG = """Attempts on the lineage are marked *; a branch off it is drawn to the right.

example:
  neox-ledger log --run runs/pythia"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_run_option(parser)
    add_json_option(parser)


def run(options: argparse.Namespace) -> int:
    """Print where the run came from, its attempts, and its segments."""
    view = opened_run(options)
    roots = history(view)
    if options.json:
        print_json(_as_json(view, roots))
        return 0
    ledger = view.ledger
    say(f"run {ledger.run_id}, lineage up to step {number(ledger.step)}")
    for line in _origin(view):
        say(line)
    say("", *_tree(roots, ""))
    if view.save is None:
        say(
            "(the attempts are in the run's save directory; this is a checkpoint alone)"
            if view.lost_attempts is None
            else f"({view.lost_attempts} is gone; this is what the checkpoint tells)"
        )
        _print_spans(view)
    for name, state in ledger.streams.items():
        say("", f"{name} stream: next position {number(state.next_position)}")
        print_table(
            [
                "from step>" if name == "train" else "evaluation>",
                "samples each>",
                "position>",
                "order",
                "order position>",
                "data",
            ],
            [
                (
                    number(segment.first_step),
                    number(segment.batch_size),
                    number(segment.first_position),
                    segment.order_id[:12],
                    number(segment.first_order_position),
                    _data(view, view.order(segment)),
                )
                for segment in state.segments
            ],
        )
    for change in ledger.accepted:
        say(
            "",
            f"after step {change.after_step} the data was changed, as accepted: "
            f"{', '.join(change.keys)}",
        )
    return 0


def _origin(view: RunView) -> Iterator[str]:
    ledger = view.ledger
    if ledger.adopted is not None:
        yield f"adopted {ledger.adopted.source} (step {number(ledger.adopted.step)}); assumed:"
        yield from (f"  {sentence}" for sentence in ledger.adopted.assumed)
    parent = ledger.parent
    while parent is not None:
        verb = "continues" if parent.is_continued else "finetuned from"
        yield f"{verb} run {parent.run_id} at step {number(parent.step)} ({parent.save})"
        parent = parent.parent


def _tree(nodes: Sequence[AttemptNode], indent: str) -> Iterator[str]:
    """Yield lines; of several attempts that went on from one, the lineage's stays below it."""
    for node in nodes:
        mark = "*" if node.is_on_lineage else "o"
        yield f"{indent}{mark} {_line(node)}"
        straight = node.successor
        for branch in node.children:
            if branch is not straight:
                yield from _tree([branch], f"{indent}| ")
        if straight is not None:
            yield from _tree([straight], indent)


def _line(node: AttemptNode) -> str:
    facts = node.facts
    started = datetime.fromtimestamp(facts.started).strftime("%Y-%m-%d %H:%M:%S")
    parts = [f"attempt {facts.number}", started]
    parts.append(
        f"steps {number(facts.begin.step + 1)}..{number(node.last_step)}"
        if node.last_step > facts.begin.step
        else f"no step after {number(facts.begin.step)}"
    )
    if facts.obeyed and facts.instruction is not None:
        parts.append(f"[{facts.instruction}]")
    if node.abandoned is not None:
        parts.append(f"({node.abandoned} abandoned)")
    if facts.committed:
        parts.append("saved " + ", ".join(number(one.step) for one in facts.committed))
    geometry = facts.geometry
    parts.append(
        f"{geometry.micro_batch_size} x {geometry.data_parallel_size} ranks x "
        f"{geometry.gradient_accumulation_steps}"
    )
    parts.append(node.ending)
    return "  ".join(parts)


def _print_spans(view: RunView) -> None:
    print_table(
        ["attempt>", "first step>", "last step>", "chain", "run"],
        [
            (span.attempt, number(span.first_step), number(span.last_step), span.chain, span.run_id)
            for span in view.ledger.spans
        ],
    )


def _data(view: RunView, order: OrderDescription) -> str:
    names = [component_name(one, view.ledger.datasets, order) for one in order.components]
    if order.weights is None:
        return names[0]
    return ", ".join(
        f"{weight:.4g} {name}" for weight, name in zip(order.weights, names, strict=True)
    )


def _as_json(view: RunView, roots: Sequence[AttemptNode]) -> dict[str, Any]:
    ledger = view.ledger
    return {
        "run": ledger.run_id,
        "step": ledger.step,
        "adopted": None if ledger.adopted is None else dataclasses.asdict(ledger.adopted),
        "parent": None if ledger.parent is None else dataclasses.asdict(ledger.parent),
        "attempts": [_node(node) for node in _flat(roots)],
        "spans": [dataclasses.asdict(span) for span in ledger.spans],
        "streams": {
            name: {
                "next_position": state.next_position,
                "segments": [dataclasses.asdict(segment) for segment in state.segments],
            }
            for name, state in ledger.streams.items()
        },
        "orders": {name: order.to_json() for name, order in ledger.orders.items()},
        "accepted": [dataclasses.asdict(change) for change in ledger.accepted],
    }


def _flat(nodes: Sequence[AttemptNode]) -> Iterator[AttemptNode]:
    for node in nodes:
        yield node
        yield from _flat(node.children)


def _node(node: AttemptNode) -> dict[str, Any]:
    facts = node.facts
    return {
        "attempt": facts.number,
        "after": facts.begin.spans[-1].attempt if facts.begin.spans else None,
        "started": facts.started,
        "first_step": facts.begin.step + 1,
        "last_step": node.last_step,
        "on_lineage": None if node.kept is None else [node.kept.first, node.kept.last],
        "abandoned": None
        if node.abandoned is None
        else [node.abandoned.first, node.abandoned.last],
        "instruction": None if facts.instruction is None else str(facts.instruction),
        "obeyed": facts.obeyed,
        "committed": [one.step for one in facts.committed],
        "geometry": dataclasses.asdict(facts.geometry),
        "topology": dataclasses.asdict(facts.topology),
        "stop": None if facts.stop is None else facts.stop.reason,
    }
