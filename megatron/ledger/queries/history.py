"""The attempts of a run as a tree: what each went on from, and what became of its steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron.ledger.attempt_facts import AttemptFacts, read_all_attempt_facts
from megatron.ledger.attempts import attempt_lines_path
from megatron.ledger.line_search import read_end
from megatron.ledger.lineage import StepRange
from megatron.ledger.queries.run_view import RunView

__all__ = ["AttemptNode", "history"]


@dataclass
class AttemptNode:
    """One attempt, and those that went on from a checkpoint of it."""

    facts: AttemptFacts
    last_step: int  # newest one with a line; the one it began after, if there is none
    kept: StepRange | None  # its steps that are on the lineage
    abandoned: StepRange | None  # its steps that are not
    is_newest: bool
    children: list["AttemptNode"] = field(default_factory=list)

    @property
    def is_on_lineage(self) -> bool:
        """Whether the present lineage goes through it."""
        return self.kept is not None or self.is_newest

    @property
    def successor(self) -> "AttemptNode | None":
        """The attempt with which the lineage goes on, or else the newest that went on from here."""
        on_lineage = [child for child in self.children if child.leads_to_lineage]
        return next(iter(on_lineage or reversed(self.children)), None)

    @property
    def leads_to_lineage(self) -> bool:
        """Whether it, or one that went on from it, is on the lineage."""
        return self.is_on_lineage or any(child.leads_to_lineage for child in self.children)

    @property
    def ending(self) -> str:
        """Say how it ended."""
        if self.facts.stop is not None:
            return self.facts.stop.reason
        return "running, or killed" if self.is_newest else "killed"


def history(run: RunView) -> list[AttemptNode]:
    """Return the attempts that began without a checkpoint of another attempt here, oldest first.

    A checkpoint alone has no attempts to show.

    Raises:
        RunDirectoryError: an attempt's file was damaged.
    """
    if run.save is None:
        return []
    attempts = read_all_attempt_facts(run.save)
    nodes = [_node(run, run.save, facts, is_newest=facts is attempts[-1]) for facts in attempts]
    roots: list[AttemptNode] = []
    for index, node in enumerate(nodes):
        origin = _origin(nodes[:index], node.facts)
        (roots if origin is None else origin.children).append(node)
    return roots


def _node(run: RunView, save: Path, facts: AttemptFacts, *, is_newest: bool) -> AttemptNode:
    path = attempt_lines_path(save, facts.number)
    end = read_end(path).step if path.exists() else None
    begin = facts.begin.step
    last = begin if end is None else end.step
    kept_to = max(
        (
            span.last_step
            for span in run.ledger.spans
            if (span.run_id, span.attempt) == (facts.run_id, facts.number)
        ),
        default=begin,
    )
    return AttemptNode(
        facts=facts,
        last_step=last,
        kept=_steps(begin + 1, min(last, kept_to)),
        abandoned=_steps(max(begin, kept_to) + 1, last),
        is_newest=is_newest,
    )


def _steps(first: int, last: int) -> StepRange | None:
    return StepRange(first, last) if first <= last else None


def _origin(earlier: Sequence[AttemptNode], facts: AttemptFacts) -> AttemptNode | None:
    """Return the attempt that wrote the last line before this one began."""
    spans = facts.begin.spans
    if not spans:
        return None
    for node in reversed(earlier):
        if (node.facts.run_id, node.facts.number) == (spans[-1].run_id, spans[-1].attempt):
            return node
    return None
