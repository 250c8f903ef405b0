"""Are the lines of a lineage the ones that were written, and do they tell of exact consumption?

Checked are: that every line is a record and continues from the line before (nothing was edited,
dropped, moved or added); that the checkpoint's chain head and sum of digests are those of the lines
it covers; that every step consumed exactly its positions (no repeat, no skip), evaluations too.
"""

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron.base.errors import RunDirectoryError
from megatron.ledger.attempt_facts import AttemptFacts, read_attempt_facts
from megatron.ledger.attempts import (
    EvaluationRecord,
    Line,
    StepRecord,
    attempt_files,
    attempt_lines_path,
    attempt_number,
    decode_line,
    next_attempt_number,
)
from megatron.ledger.chain import next_chain
from megatron.ledger.digests import MODULUS, digest_text, digest_value
from megatron.ledger.ledger_file import Ledger, Span
from megatron.ledger.lineage import Lineage
from megatron.ledger.run_file import RUN_FILE, read_run_file

__all__ = ["Finding", "LineageCheck", "check_abandoned", "check_lineage"]


@dataclass(frozen=True)
class Finding:
    """Something that contradicts exact, untouched records."""

    path: Path
    line: int | None  # from 1; None: not of one line
    step: int | None  # the first step in doubt
    text: str

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}" if self.line is not None else str(self.path)
        return f"{where}: {self.text}"


@dataclass(frozen=True)
class LineageCheck:
    """What was found on a lineage, the first steps first, and how many lines were looked at."""

    findings: tuple[Finding, ...]
    num_steps: int
    num_evaluations: int


@dataclass(frozen=True)
class _Lines:
    """The lines of one file up to the first bad one."""

    path: Path
    texts: Sequence[bytes]
    good: tuple[Line, ...]
    finding: Finding | None

    @property
    def chains(self) -> set[str | None]:
        return {line.chain for line in self.good}

    @property
    def stated_chains(self) -> set[str | None]:
        """Also of lines behind the bad one."""
        if self.finding is None:
            return self.chains
        return {line.chain for line in _others(self.texts, 0).values()}


def check_lineage(lineage: Lineage) -> LineageCheck:
    """Check the lines of a lineage, as far as they are at hand."""
    ledger = lineage.ledger
    findings: list[Finding] = []
    positions = _Positions(ledger, knows_start=ledger.adopted is None)
    previous = ledger.spans[0].run_id if ledger.spans else ledger.run_id
    num_steps = num_evaluations = 0
    for span in ledger.spans:
        path = lineage.lines_path(span)
        if path is None:
            positions.lose_track()
            findings.extend(_missing(lineage, span))
        else:
            lines = _read(path, previous, span.first_step)
            covered, found = _covered(lines, span)
            findings.extend(found)
            findings.extend(positions.check(path, covered))
            num_steps += sum(isinstance(line.record, StepRecord) for line in covered)
            num_evaluations += sum(isinstance(line.record, EvaluationRecord) for line in covered)
            if found:
                positions.lose_track()
        previous = span.chain
    return LineageCheck(tuple(findings), num_steps, num_evaluations)


def check_abandoned(save: Path, lineage: Lineage) -> tuple[Finding, ...]:
    """Check the lines of a run's attempts that are not on ``lineage``.

    Lines at the end of an attempt that was killed can be cut off unseen; where it stopped in an
    orderly way, or saved, they can't.
    """
    covered = {(span.run_id, span.attempt): span for span in lineage.ledger.spans}
    findings: list[Finding] = []
    known: set[str | None] = set()
    for path in attempt_files(save):
        try:
            facts = read_attempt_facts(save, attempt_number(path))
        except RunDirectoryError as error:
            findings.append(Finding(path.with_suffix(".json"), None, None, str(error)))
            continue
        if facts is None:
            found, chains = _without_facts(path)
            findings.extend(found)
            known |= chains
            continue
        known.add(facts.run_id)
        findings.extend(_check_origin(path, facts, known))
        lines = _read(path, facts.begin.chain, facts.begin.step + 1)
        known |= lines.stated_chains
        span = covered.get((facts.run_id, facts.number))
        if span is not None and span.chain not in lines.chains:
            continue  # check_lineage says so
        if lines.finding is not None:
            findings.append(lines.finding)
        else:
            findings.extend(_check_end(lines, facts))
    findings.extend(_missing_abandoned(save, covered))
    findings.extend(_check_run_file(save))
    return tuple(findings)


def _check_run_file(save: Path) -> Iterator[Finding]:
    path = save / RUN_FILE
    try:
        run = read_run_file(save)
    except RunDirectoryError as error:
        yield Finding(path, None, None, str(error))
        return
    ids = {facts.run_id for facts in _readable_facts(save)}
    if run is None and ids:
        text = f"the file is missing; the attempts are those of run {', '.join(sorted(ids))}"
        yield Finding(path, None, None, text)
    elif run is not None and ids - {run.run_id}:
        others = ", ".join(sorted(ids - {run.run_id}))
        yield Finding(path, None, None, f"it says run {run.run_id}, attempts say {others}")


def _without_facts(path: Path) -> tuple[list[Finding], set[str | None]]:
    """Return what is wrong with an attempt of lines alone, and the chains of its lines.

    Nothing, if it is of a release that kept no chain, or was killed as it began.
    """
    chained = [line for line in _others(path.read_bytes().split(b"\n"), 0).values() if line.chain]
    steps = [line.record.step for line in chained if isinstance(line.record, StepRecord)]
    if not chained:
        return [], set()
    held = f" of steps {steps[0]}..{steps[-1]}" if steps else ""
    text = f"the file is missing: what the lines{held} beside it went on from isn't known"
    finding = Finding(path.with_suffix(".json"), None, steps[0] if steps else None, text)
    return [finding], {line.chain for line in chained}


def _missing_abandoned(save: Path, covered: Container[tuple[str, int]]) -> Iterator[Finding]:
    """Yield the attempts off the lineage that noted steps, but whose lines are gone."""
    for facts in _readable_facts(save):
        path = attempt_lines_path(save, facts.number)
        noted = [one.step for one in facts.committed]
        if facts.stop is not None and facts.stop.chain != facts.begin.chain:
            noted.append(facts.stop.step)
        if path.exists() or not noted or (facts.run_id, facts.number) in covered:
            continue
        first, last = facts.begin.step + 1, max(noted)
        held = f"steps {first}..{last}" if first <= last else "evaluations only"
        yield Finding(path, None, first, f"the file is missing; it held {held}")


def _readable_facts(save: Path) -> Iterator[AttemptFacts]:
    for number in range(1, next_attempt_number(save)):
        with contextlib.suppress(RunDirectoryError):  # what is wrong with it is said already
            facts = read_attempt_facts(save, number)
            if facts is not None:
                yield facts


@dataclass
class _Positions:
    """Follows the positions of every stream over a lineage."""

    ledger: Ledger
    knows_start: bool
    _next: dict[str, int] = field(default_factory=dict)  # streams we haven't lost track of

    def __post_init__(self) -> None:
        for name, state in self.ledger.streams.items():
            if name != "train" and self.knows_start and state.segments.segments:
                self._next[name] = state.segments.segments[0].first_position

    def lose_track(self) -> None:
        self._next.clear()

    def check(self, path: Path, lines: Sequence[Line]) -> Iterator[Finding]:
        for line in lines:
            record = line.record
            text = (
                self._check_step(record)
                if isinstance(record, StepRecord)
                else self._check_evaluation(record)
            )
            if text is not None:
                step = record.step if isinstance(record, StepRecord) else record.after_step
                yield Finding(path, line.number, step, text)

    def _check_step(self, record: StepRecord) -> str | None:
        expected = self.ledger.streams["train"].segments.positions(record.step)
        if (record.position, record.samples) == (expected.start, len(expected)):
            return None
        return (
            f"step {record.step} consumed positions {record.position}.."
            f"{record.position + record.samples}, its segment says {expected.start}.."
            f"{expected.stop}: samples were repeated or skipped"
        )

    def _check_evaluation(self, record: EvaluationRecord) -> str | None:
        expected = self._next.get(record.stream, record.position)
        stop = record.position + record.samples
        self._next[record.stream] = record.position if record.at_end else stop
        if record.position == expected:
            return None
        return (
            f"the {record.stream} evaluation after step {record.after_step} read from position "
            f"{record.position}, the one before it ended at {expected}: samples were repeated or "
            "skipped"
        )


def _missing(lineage: Lineage, span: Span) -> Iterator[Finding]:
    """Yield that a span's file is gone, if the files beside it are at hand."""
    directory = lineage.directories.get(span.run_id)
    if directory is None or not attempt_files(directory):
        return  # a checkpoint copied away alone has no lines, and none are expected
    path = attempt_lines_path(directory, span.attempt)
    steps = f"steps {span.first_step}..{span.last_step}"
    held = f"{steps} of the lineage" if span.first_step <= span.last_step else "evaluations only"
    yield Finding(path, None, span.first_step, f"the file is missing; it held {held}")


def _covered(lines: _Lines, span: Span) -> tuple[tuple[Line, ...], list[Finding]]:
    """Return the lines that a checkpoint covers, and what is wrong with them."""
    for index, line in enumerate(lines.good):
        if line.chain == span.chain:
            covered = lines.good[: index + 1]
            return covered, _check_sum(lines.path, covered, span)
    if lines.finding is not None:
        return lines.good, [lines.finding]
    last = max(
        (line.record.step for line in lines.good if isinstance(line.record, StepRecord)),
        default=span.first_step - 1,
    )
    if last < span.last_step:
        text = f"the lines of steps {last + 1}..{span.last_step} are missing: the end was cut off"
        return lines.good, [Finding(lines.path, None, last + 1, text)]
    text = (
        f"no line has the chain {span.chain} that the checkpoint notes for step {span.last_step}: "
        "lines were written anew or cut off, or the checkpoint is another run's"
    )
    return lines.good, [Finding(lines.path, None, span.first_step, text)]


def _check_sum(path: Path, lines: Sequence[Line], span: Span) -> list[Finding]:
    steps = [line.record for line in lines if isinstance(line.record, StepRecord)]
    found = [record.step for record in steps]
    if found != list(range(span.first_step, span.last_step + 1)):
        text = (
            f"the ledger says that steps {span.first_step}..{span.last_step} were taken here, the "
            f"lines tell of {len(found)} steps"
        )
        return [Finding(path, None, span.first_step, text)]
    total = digest_text(sum(digest_value(record.digest or "0") for record in steps) % MODULUS)
    if span.digest_sum in ("", total):
        return []
    text = (
        f"the digests of steps {span.first_step}..{span.last_step} sum up to {total}, the ledger "
        f"says {span.digest_sum}"
    )
    return [Finding(path, None, span.first_step, text)]


def _check_origin(path: Path, facts: AttemptFacts, known: set[str | None]) -> Iterator[Finding]:
    begin = facts.begin
    is_ours = not begin.spans or begin.spans[-1].run_id == facts.run_id
    is_gone = (  # which is said already
        is_ours
        and begin.spans
        and not attempt_lines_path(path.parents[1], begin.spans[-1].attempt).exists()
    )
    if is_ours and not is_gone and begin.chain not in known:
        yield Finding(
            path.with_suffix(".json"),
            None,
            begin.step + 1,
            f"the attempt says it went on from chain {begin.chain} at step {begin.step}, which "
            "no line of this run has",
        )


def _check_end(lines: _Lines, facts: AttemptFacts) -> Iterator[Finding]:
    """Check what the attempt noted about its own lines."""
    noted = [(one.step, one.chain, "saved") for one in facts.committed]
    if facts.stop is not None:
        noted.append((facts.stop.step, facts.stop.chain, "stopped"))
    for step, chain, event in noted:
        if chain not in lines.chains and chain != facts.begin.chain:
            last = lines.good[-1].number if lines.good else 0
            steps = [one.record.step for one in lines.good if isinstance(one.record, StepRecord)]
            yield Finding(
                lines.path,
                None,
                min(step, max(steps, default=facts.begin.step) + 1),
                f"the attempt {event} after step {step} with chain {chain}, which none of its "
                f"{last} lines has: the end was cut off",
            )
            return


def _read(path: Path, previous: str, first_step: int) -> _Lines:
    """Read lines as long as each continues from the one before."""
    texts = path.read_bytes().split(b"\n")
    good: list[Line] = []
    expected = first_step
    for number, text in enumerate(texts, start=1):
        is_last = number == len(texts)
        if is_last and not text:
            break
        try:
            line = decode_line(text, number)
        except (ValueError, TypeError, KeyError) as error:
            if is_last:
                break  # torn, or being written
            found = Finding(path, number, expected, f"this is no record ({error}); it was changed")
            return _Lines(path, texts, tuple(good), found)
        record = line.record
        is_next = isinstance(record, EvaluationRecord) or record.step == expected
        if next_chain(previous, line.body) != line.chain or not is_next:
            reason = _reason(texts, line, expected)
            return _Lines(path, texts, tuple(good), Finding(path, number, expected, reason))
        good.append(line)
        previous = line.chain
        expected += isinstance(record, StepRecord)
    return _Lines(path, texts, tuple(good), None)


def _reason(texts: Sequence[bytes], line: Line, expected: int) -> str:
    """Say what may have been done to the file before or at its first bad line."""
    record = line.record
    # the step before which the line belongs
    step = record.step if isinstance(record, StepRecord) else record.after_step + 1
    name = f"the line of step {step}" if isinstance(record, StepRecord) else "an evaluation's line"
    others = _others(texts, line.number)
    follows = [
        number
        for number, other in others.items()
        if next_chain(other.chain or "", line.body) == line.chain
    ]
    if line.chain is None:
        return "the line has no chain; it was changed, or written by something else"
    later_steps = {
        other.record.step
        for number, other in others.items()
        if number > line.number and isinstance(other.record, StepRecord)
    }
    if step < expected or (step > expected and expected in later_steps):
        return f"{name} stands where step {expected} is expected: it was moved or changed"
    if step == expected + 1:
        return f"the line of step {expected} is missing before it"
    if step > expected:
        return f"the lines of steps {expected}..{step - 1} are missing before it"
    if follows:
        return f"it continues from line {follows[0]}: it was moved"
    return (
        "it doesn't continue from the line before: it was changed, or a line before it is missing"
    )


def _others(texts: Sequence[bytes], number: int) -> Mapping[int, Line]:
    others = {}
    for other, text in enumerate(texts, start=1):
        if other != number:
            try:
                others[other] = decode_line(text, other)
            except (ValueError, TypeError, KeyError):
                continue
    return others
