"""Which steps led to a checkpoint, or to where a run is now, and their lines.

A lineage is what a ledger says; the lines are read from the directories of the runs it went
through, as far as they are at hand. A checkpoint's directory alone is enough for everything but the
lines. Nothing is locked: a run may be writing meanwhile.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.base.errors import RunDirectoryError
from megatron.ledger.attempt_facts import AttemptFacts, read_all_attempt_facts
from megatron.ledger.attempts import (
    EvaluationRecord,
    Line,
    StepRecord,
    attempt_lines_path,
    read_lines,
)
from megatron.ledger.ledger_file import Ledger, Parent, Span, read_ledger
from megatron.ledger.line_search import find_step, lines_since, read_end
from megatron.ledger.run_file import read_run_file

__all__ = [
    "AbandonedSteps",
    "Lineage",
    "StepRange",
    "abandoned_steps",
    "lineage_of_checkpoint",
    "lineage_of_ledger",
    "lineage_of_run",
]


@dataclass(frozen=True, order=True)
class StepRange:
    """Steps ``first`` to ``last``, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}..{self.last}"


@dataclass(frozen=True)
class AbandonedSteps:
    """Lines that one attempt wrote for steps that are not on the lineage."""

    facts: AttemptFacts
    steps: StepRange
    lines: Path


@dataclass(frozen=True)
class Lineage:
    """The steps that led to ``ledger.step``, and where their lines are."""

    ledger: Ledger
    directories: Mapping[str, Path]  # run id -> its directory, as far as they are at hand

    def lines_path(self, span: Span) -> Path | None:
        """Return the file with the lines of a span, None if it isn't at hand."""
        directory = self.directories.get(span.run_id)
        if directory is None:
            return None
        path = attempt_lines_path(directory, span.attempt)
        return path if path.exists() else None

    def span_of(self, step: int) -> Span | None:
        """Return the span with ``step``; None if it was adopted, or is not on the lineage."""
        for span in self.ledger.spans:
            if span.first_step <= step <= span.last_step:
                return span
        return None

    def step(self, step: int) -> StepRecord | None:
        """Return the record of one step, None if there is no line of it at hand.

        Raises:
            RunDirectoryError: its line was damaged.
        """
        span = self.span_of(step)
        path = None if span is None else self.lines_path(span)
        return None if path is None else find_step(path, step)

    def steps(self, first: int = 1, last: int | None = None) -> Iterator[StepRecord]:
        """Yield the records of steps ``first`` to ``last`` (included), as far as lines are at hand.

        Raises:
            RunDirectoryError: a line was damaged.
        """
        last = self.ledger.step if last is None else min(last, self.ledger.step)
        for span, path in self._spans_at_hand():
            start, stop = max(first, span.first_step), min(last, span.last_step)
            if start > stop:
                continue
            for line in lines_since(path, start):
                if not isinstance(line.record, StepRecord):
                    continue
                if line.record.step > stop:
                    break
                yield line.record

    def evaluations(self) -> Iterator[EvaluationRecord]:
        """Yield the evaluations on the lineage, as far as lines are at hand.

        Raises:
            RunDirectoryError: a line was damaged.
        """
        for span, path in self._spans_at_hand():
            for line in lines_of_span(span, path):
                if isinstance(line.record, EvaluationRecord):
                    yield line.record

    def adopted(self) -> StepRange | None:
        """Return the steps that were computed from a foreign checkpoint, not observed."""
        adopted = self.ledger.adopted
        return StepRange(1, adopted.step) if adopted is not None and adopted.step > 0 else None

    def unrecorded(self) -> list[StepRange]:
        """Return the observed steps of the lineage of which no line is at hand, ascending."""
        missing = []
        for span in self.ledger.spans:
            path = self.lines_path(span)
            next_step = span.first_step
            if path is not None:
                for record in self.steps(span.first_step, span.last_step):
                    if record.step > next_step:
                        missing.append(StepRange(next_step, record.step - 1))
                    next_step = record.step + 1
            if next_step <= span.last_step:
                missing.append(StepRange(next_step, span.last_step))
        return missing

    def _spans_at_hand(self) -> Iterator[tuple[Span, Path]]:
        for span in self.ledger.spans:
            path = self.lines_path(span)
            if path is not None:
                yield span, path


def lines_of_span(span: Span, path: Path) -> Iterator[Line]:
    """Yield an attempt's lines up to the one the checkpoint was saved after.

    Raises:
        RunDirectoryError: a line was damaged.
    """
    for line in read_lines(path):
        if isinstance(line.record, StepRecord) and line.record.step > span.last_step:
            return
        yield line
        if line.chain == span.chain:
            return


def lineage_of_ledger(ledger: Ledger, directories: Sequence[Path] = ()) -> Lineage:
    """Return the lineage of a ledger, with lines from ``directories`` and its parents'.

    Args:
        ledger: of a checkpoint, or one that an attempt began with.
        directories: where runs may be, tried before the places the ledger remembers.
    """
    wanted = {span.run_id for span in ledger.spans} | {ledger.run_id}
    found: dict[str, Path] = {}
    for directory in [*directories, *_parents_directories(ledger.parent)]:
        run_id = _run_id(directory)
        if run_id in wanted and run_id is not None:
            found.setdefault(run_id, directory)
    return Lineage(ledger, found)


def lineage_of_checkpoint(checkpoint: Path, directories: Sequence[Path] = ()) -> Lineage | None:
    """Return the lineage of a ``global_stepN`` directory, wherever it was copied to.

    Returns:
        None if the checkpoint has no ledger.

    Raises:
        CheckpointError: its ledger was damaged.
    """
    ledger = read_ledger(checkpoint)
    if ledger is None:
        return None
    return lineage_of_ledger(ledger, [*directories, checkpoint.resolve().parent])


def lineage_of_run(save: Path, directories: Sequence[Path] = ()) -> Lineage | None:
    """Return the lineage of a run's newest attempt, up to the last line it has written.

    Cursors of datasets are those it began with.

    Returns:
        None if no attempt has begun under a release that kept a ledger.

    Raises:
        RunDirectoryError: a file was damaged.
    """
    attempts = read_all_attempt_facts(save)
    if not attempts:
        return None
    ledger = _ledger_so_far(attempts[-1], attempt_lines_path(save, attempts[-1].number))
    return lineage_of_ledger(ledger, [*directories, save])


def abandoned_steps(save: Path, lineage: Lineage) -> list[AbandonedSteps]:
    """Return what the run in ``save`` recorded of steps that are not on ``lineage``, by attempt.

    Raises:
        RunDirectoryError: a file was damaged.
    """
    kept = {
        span.attempt: span.last_step
        for span in lineage.ledger.spans
        if lineage.directories.get(span.run_id) == save or span.run_id == _run_id(save)
    }
    found = []
    for facts in read_all_attempt_facts(save):
        path = attempt_lines_path(save, facts.number)
        if not path.exists():
            continue
        first = kept.get(facts.number, facts.begin.step) + 1
        steps = [
            line.record.step
            for line in lines_since(path, first)
            if isinstance(line.record, StepRecord)
        ]
        if steps:
            found.append(AbandonedSteps(facts, StepRange(steps[0], steps[-1]), path))
    return found


def _run_id(directory: Path) -> str | None:
    try:
        run = read_run_file(directory)
    except RunDirectoryError:
        run = None
    if run is not None:
        return run.run_id
    # Lost or damaged, for verify to tell; attempts say it too.
    with contextlib.suppress(RunDirectoryError):
        attempts = read_all_attempt_facts(directory)
        return attempts[-1].run_id if attempts else None
    return None


def _parents_directories(parent: Parent | None) -> Iterator[Path]:
    while parent is not None:
        yield Path(parent.save)
        parent = parent.parent


def _ledger_so_far(facts: AttemptFacts, path: Path) -> Ledger:
    begin = facts.begin
    end = read_end(path) if path.exists() else None
    if end is None or end.chain is None:
        return begin
    span = Span(
        run_id=facts.run_id,
        attempt=facts.number,
        first_step=begin.step + 1,
        last_step=begin.step if end.step is None else end.step.step,
        chain=end.chain,
        digest_sum="",  # nobody has vouched for it yet
        numerics=facts.span_numerics,
        geometry=facts.geometry,
    )
    positions = {name: record.position + record.samples for name, record in end.evaluations.items()}
    if end.step is not None:
        positions["train"] = end.step.position + end.step.samples
    streams = {
        name: replace(state, next_position=positions.get(name, state.next_position))
        for name, state in begin.streams.items()
    }
    return replace(
        begin,
        step=span.last_step,
        spans=(*begin.spans, span),
        streams=streams,
        evaluation_due=begin.evaluation_due and not end.evaluations,
    )
