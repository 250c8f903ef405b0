"""Does everything agree: lines, positions, and what the data gives?

The lines of a lineage must be the ones that were written (chain), tell of every position once (E1,
E2), and agree with the ledgers of checkpoints. What really was read is compared with what the order
says was to be read: digests are computed anew from the data.
"""

import contextlib
import random
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError, RunDirectoryError
from megatron.ledger.attempt_facts import read_all_attempt_facts
from megatron.ledger.attempts import StepRecord, attempt_lines_path, read_lines
from megatron.ledger.digests import MODULUS, batch_digest, digest_text, digest_value
from megatron.ledger.ledger_file import Span
from megatron.ledger.lineage_check import Finding, check_abandoned, check_lineage
from megatron.ledger.queries.cursor_check import discontinuities, unreached
from megatron.ledger.queries.findings import Problem, Report
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.run_view import RunView
from megatron.ledger.redone_steps import EarlierLines
from megatron.stream.segments import Segment, SegmentTable

__all__ = ["Extent", "verify"]

_SAMPLES_AT_ONCE = 1024
_NAMED_RANGES = 5


@dataclass(frozen=True)
class Extent:
    """Whose digests are computed anew."""

    steps: range | None = None  # None: all
    sample: int | None = None  # so many of them, drawn by ``seed``; None: each
    seed: int = 0

    def choose(self, last_step: int) -> Sequence[int]:
        """Return the steps, ascending."""
        steps = range(1, last_step + 1)
        if self.steps is not None:
            steps = range(self.steps.start, min(self.steps.stop, last_step + 1))
        if self.sample is None or self.sample >= len(steps):
            return steps
        return sorted(random.Random(self.seed).sample(steps, self.sample))


def verify(
    run: RunView,
    data: RunData | None,
    extent: Extent,
    *,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Check a lineage.

    Args:
        run: what is checked.
        data: where its datasets are; None: digests aren't computed anew.
        extent: of which steps they are.
        on_step: told how many of how many steps are computed.

    Raises:
        RunDirectoryError: files cannot be read at all.
    """
    lines = _check_lines(run)
    unrecorded = tuple(run.lineage.unrecorded()) if lines.is_readable else ()
    if unrecorded:
        ranges = ", ".join(map(str, unrecorded))
        lost = run.lost_attempts
        why = "" if lost is None else f": {lost} is gone; put a copy of it back"
        lines.unknown.append(f"the lines of steps {ranges} are not here{why}")
    if data is not None and extent.steps is not None and extent.steps.stop - 1 > run.ledger.step:
        lines.unknown.append(
            f"step {extent.steps.stop - 1} isn't done yet: the lineage ends with step "
            f"{run.ledger.step}"
        )
    _check_cursors(run, lines)
    _check_steps_done_again(run, lines)
    if data is not None:
        _Recomputation(run, data, lines).check(extent.choose(run.ledger.step), on_step)
    return Report(
        last_step=run.ledger.step,
        problems=tuple(sorted(lines.problems, key=lambda one: (one.step is None, one.step or 0))),
        warnings=tuple(lines.warnings),
        unknown=tuple(lines.unknown),
        recorded=lines.recorded,
        evaluations=lines.evaluations,
        adopted=run.lineage.adopted(),
        unrecorded=unrecorded,
        accepted=run.ledger.accepted,
        recomputed=tuple(lines.recomputed),
        recomputed_evaluations=lines.recomputed_evaluations,
        done_again=lines.done_again,
        datasets={note.path: note.level for note in run.ledger.datasets.values()},
    )


@dataclass
class _Findings:
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    recorded: int = 0
    evaluations: int = 0
    recomputed: list[int] = field(default_factory=list)
    recomputed_evaluations: int = 0
    done_again: int = 0

    @property
    def is_readable(self) -> bool:
        return not any(problem.check == "lines" for problem in self.problems)


def _check_lines(run: RunView) -> _Findings:
    checked = check_lineage(run.lineage)
    found = [_problem(finding) for finding in checked.findings]
    if run.save is not None:
        found += [_problem(finding) for finding in check_abandoned(run.save, run.lineage)]
    return _Findings(
        problems=found, recorded=checked.num_steps, evaluations=checked.num_evaluations
    )


def _problem(finding: Finding) -> Problem:
    return Problem("lines", finding.step, finding.text, finding.path, finding.line)


def _check_cursors(run: RunView, found: _Findings) -> None:
    spans = run.ledger.spans
    if spans and spans[-1].digest_sum:  # of a checkpoint, not of lines that go on from one
        last = run.ledger.step
        found.problems += [Problem("positions", last, text) for text in unreached(run.ledger)]
        found.problems += _misplaced_evaluations(run, found)
    for stream in run.ledger.streams:
        for one in discontinuities(run.ledger, stream):
            step = one.step if stream == "train" else None
            found.problems.append(Problem("positions", step, one.text))


def _misplaced_evaluations(run: RunView, found: _Findings) -> Iterator[Problem]:
    """Yield evaluation streams that a checkpoint doesn't leave where their last line ended."""
    if not found.is_readable or any(run.lineage.unrecorded()):
        return
    ends: dict[str, int] = {}
    for record in run.lineage.evaluations():
        if not record.at_end:
            ends[record.stream] = record.position + record.samples
    for name, end in ends.items():
        state = run.ledger.streams[name]
        if state.next_position != end:
            text = (
                f"the {name} stream goes on at position {state.next_position}, but the last "
                f"evaluation ended at {end}"
            )
            yield Problem("positions", run.ledger.step, text)


def _check_steps_done_again(run: RunView, found: _Findings) -> None:
    """Compare each attempt with those before it, as it did itself while it ran."""
    if run.save is None or not found.is_readable:
        return
    for facts in read_all_attempt_facts(run.save):
        path = attempt_lines_path(run.save, facts.number)
        if path.exists():
            records = [line.record for line in read_lines(path)]
            differences = EarlierLines.of_run(run.save, facts).compare(records)
            found.problems += [Problem("repetition", None, text) for text in differences.errors]
            found.warnings += differences.warnings


class _Recomputation:
    """Computes digests from the data and compares them with recorded ones."""

    def __init__(self, run: RunView, data: RunData, found: _Findings) -> None:
        self._run = run
        self._data = data
        self._found = found
        self._unreadable: dict[str, _Unreadable] = {}  # by reason
        self._unopened: dict[str, str] = {}  # why, by order: it isn't tried again

    def check(self, chosen: Sequence[int], on_step: Callable[[int, int], None]) -> None:
        """Check some steps, ascending, and the evaluations after them."""
        sums = _SpanSums(self._run.ledger.spans)
        records = self._records(chosen)
        for done, step in enumerate(chosen, start=1):
            positions = self._run.stream("train").segments.positions(step)
            digest = self._digest("train", positions, of=step)
            if digest is not None:
                sums.add(step, digest)
                self._compare_step(step, digest, records.get(step))
            on_step(done, len(chosen))
        if self._found.is_readable:
            self._check_evaluations(set(chosen))
        for span, total in sums.complete():
            self._compare_sum(span, total)
        self._found.unknown += map(str, self._unreadable.values())

    def _records(self, chosen: Sequence[int]) -> dict[int, StepRecord]:
        records: dict[int, StepRecord] = {}
        wanted = set(chosen)
        with contextlib.suppress(RunDirectoryError):  # what can't be read is a problem already
            for record in self._run.lineage.steps(min(wanted, default=1), max(wanted, default=0)):
                if record.step in wanted:
                    records[record.step] = record
        return records

    def _compare_step(self, step: int, digest: int, record: StepRecord | None) -> None:
        if record is None or record.digest is None:
            return
        self._found.recomputed.append(step)
        if digest_value(record.digest) != digest:
            self._found.problems.append(
                Problem(
                    "digests",
                    step,
                    f"its order and the data give digest {digest_text(digest)}, but what was read "
                    f"had {record.digest}: data, index maps or code were not what they are now",
                )
            )

    def _check_evaluations(self, steps: Container[int]) -> None:
        for record in self._run.lineage.evaluations():
            if record.after_step not in steps:
                continue
            positions = range(record.position, record.position + record.samples)
            digest = self._digest(record.stream, positions, of=record.after_step)
            if digest is None:
                continue
            self._found.recomputed_evaluations += 1
            if digest_value(record.digest) != digest:
                self._found.problems.append(
                    Problem(
                        "digests",
                        record.after_step,
                        f"the {record.stream} evaluation after it: the order and the data give "
                        f"digest {digest_text(digest)}, but what was read had {record.digest}",
                    )
                )

    def _compare_sum(self, span: Span, total: int) -> None:
        if span.digest_sum == "":
            return
        compared = set(self._found.recomputed)
        compared.update(range(span.first_step, span.last_step + 1))  # also without their lines
        self._found.recomputed = sorted(compared)
        if span.digest_sum == digest_text(total):
            return
        self._found.problems.append(
            Problem(
                "digests",
                span.first_step,
                f"the digests of steps {span.first_step}..{span.last_step} computed from the data "
                f"sum up to {digest_text(total)}; the checkpoint says {span.digest_sum}",
            )
        )

    def _digest(self, stream: str, positions: range, *, of: int) -> int | None:
        """Return the digest of positions of a stream, which may cross segments.

        Args:
            stream: its name.
            positions: what a step, or an evaluation, read.
            of: the step, or the one before the evaluation.

        Returns:
            None if the data isn't at hand; the step is noted then.
        """
        total = 0
        table = self._run.stream(stream).segments
        start = positions.start
        while start < positions.stop:
            segment = table.at_step(table.step_of(start))
            stop = min(positions.stop, start + _SAMPLES_AT_ONCE, _end_of(table, segment))
            places = np.arange(start, stop, dtype=np.int64)
            try:
                tokens, companions = self._read(segment, places)
            except DatasetError as error:
                reason = str(error)
                self._unreadable.setdefault(reason, _Unreadable(reason)).note(stream, of)
                return None
            total += batch_digest(tokens, places, companions)
            start = stop
        return total % MODULUS

    def _read(
        self, segment: Segment, places: NDArray[np.int64]
    ) -> tuple[NDArray[Any], list[NDArray[Any]]]:
        if segment.order_id in self._unopened:
            raise DatasetError(self._unopened[segment.order_id])
        order = self._run.order(segment)
        try:
            self._data.stream(order)
        except DatasetError as error:
            self._unopened[segment.order_id] = str(error)
            raise
        # Fails for samples in a shard that is missing, which others needn't be.
        offset = segment.first_order_position - segment.first_position
        return self._data.read(order, places + offset)


@dataclass
class _Unreadable:
    """Steps that can't be computed, for one reason."""

    reason: str
    steps: list[int] = field(default_factory=list)  # ascending
    evaluations: list[int] = field(default_factory=list)  # steps they were made after

    def note(self, stream: str, step: int) -> None:
        (self.steps if stream == "train" else self.evaluations).append(step)

    def __str__(self) -> str:
        what = [_named("step", self.steps)] if self.steps else []
        if self.evaluations:
            what.append(f"the evaluations after {_named('step', self.evaluations)}")
        return f"the digests of {' and of '.join(what)} could not be computed: {self.reason}"


def _named(what: str, steps: Sequence[int]) -> str:
    """Return ascending numbers in few words."""
    what = f"{what}s" if len(steps) > 1 else what
    runs: list[list[int]] = []
    for step in steps:
        if runs and step <= runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    texts = [f"{first}" if first == last else f"{first}..{last}" for first, last in runs]
    if len(texts) > _NAMED_RANGES:
        first = ", ".join(texts[:_NAMED_RANGES])
        return f"{what} {first} and others up to {steps[-1]} ({len(steps)} in all)"
    return f"{what} {', '.join(texts)}"


class _SpanSums:
    """Adds up digests of the steps of spans, to compare them with what checkpoints say."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = [span for span in spans if span.last_step >= span.first_step]
        self._totals = [0] * len(self._spans)
        self._counts = [0] * len(self._spans)

    def add(self, step: int, digest: int) -> None:
        for index, span in enumerate(self._spans):
            if span.first_step <= step <= span.last_step:
                self._totals[index] += digest
                self._counts[index] += 1

    def complete(self) -> Iterator[tuple[Span, int]]:
        """Yield the spans all of whose steps were added, with their sums."""
        for span, total, count in zip(self._spans, self._totals, self._counts, strict=True):
            if count == span.last_step - span.first_step + 1:
                yield span, total % MODULUS


def _end_of(table: SegmentTable, segment: Segment) -> int:
    """Return the position after a segment's last; the last segment has no end."""
    later = [one.first_position for one in table if one.first_step > segment.first_step]
    return min(later, default=sys.maxsize)
