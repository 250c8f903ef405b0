"""Steps done again after a crash or a roll-back, compared with the lines of the first time.

Under the same segment values the same samples must be read: another digest is an error. Where
nothing that acts on numbers has changed since the run began, the loss must be the same too; there a
difference is worth a warning. Every resume thus proves itself, for free.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.base.errors import RunDirectoryError
from megatron.ledger.attempt_facts import RESET, AttemptFacts, read_attempt_facts
from megatron.ledger.attempts import (
    EvaluationRecord,
    Record,
    StepRecord,
    attempt_lines_path,
    step_of_record,
)
from megatron.ledger.line_search import lines_since

__all__ = ["Differences", "EarlierLines"]


@dataclass(frozen=True)
class Differences:
    """What comes out of comparing lines with earlier ones."""

    errors: tuple[str, ...] = ()  # other samples were read
    warnings: tuple[str, ...] = ()  # other losses came out


@dataclass(frozen=True, slots=True)
class _Earlier:
    attempt: int
    digest: str
    loss: float
    has_same_numbers: bool


class EarlierLines:
    """Lines of a run that the present attempt may write again.

    Args:
        present: the attempt that runs now.
        earlier: other attempts of its run, with the lines each has left.
    """

    def __init__(
        self, present: AttemptFacts, earlier: Iterable[tuple[AttemptFacts, Iterable[Record]]]
    ) -> None:
        self._present = present
        self._lines: dict[tuple[object, ...], list[_Earlier]] = {}
        for facts, records in earlier:
            departure = _departure(_history(present), _history(facts))
            for record in records:
                key = _key(record, facts)
                if key is None or record.digest is None:
                    continue
                same = departure is None or step_of_record(record) < departure
                if isinstance(record, EvaluationRecord):
                    # the same weights, but this attempt's way of computing with them
                    same = same and facts.numerics == present.numerics
                one = _Earlier(facts.number, record.digest, record.loss, same)
                self._lines.setdefault(key, []).append(one)

    @classmethod
    def of_run(cls, save: Path, present: AttemptFacts) -> "EarlierLines":
        """Collect the lines beyond the present attempt's first step that lie in ``save``.

        What can't be read is left to ``neox-ledger verify``: it must not stop a run.
        """
        return cls(present, _readable_attempts(save, present))

    def compare(self, records: Sequence[Record]) -> Differences:
        """Compare what was done now with what was done then."""
        errors, warnings = [], []
        for record in records:
            for then in self._lines.get(_key(record, self._present) or (), ()):
                if then.digest != record.digest:
                    errors.append(
                        f"{_name(record)} was done by attempt {then.attempt} too, from the same "
                        f"positions of the same order, but read other samples: digest "
                        f"{then.digest} then, {record.digest} now. Data, index maps or code have "
                        "changed; neox-ledger verify tells which of the two is right"
                    )
                elif then.has_same_numbers and not _equal(then.loss, record.loss):
                    warnings.append(
                        f"{_name(record)} was done by attempt {then.attempt} too, on the same "
                        f"samples and with the same settings, but its loss was {then.loss!r} and "
                        f"is {record.loss!r} now: this resume is not bitwise exact"
                    )
        return Differences(tuple(errors), tuple(warnings))


def _readable_attempts(
    save: Path, present: AttemptFacts
) -> Iterator[tuple[AttemptFacts, Iterator[Record]]]:
    for number in range(1, present.number):
        with contextlib.suppress(RunDirectoryError):
            facts = read_attempt_facts(save, number)
            if facts is not None and facts.run_id == present.run_id:
                path = attempt_lines_path(save, number)
                yield facts, _readable_records(path, present.begin.step)


def _readable_records(path: Path, step: int) -> Iterator[Record]:
    with contextlib.suppress(OSError, RunDirectoryError):
        for line in lines_since(path, step):
            yield line.record


def _key(record: Record, facts: AttemptFacts) -> tuple[object, ...] | None:
    """Return what must be equal for two lines to tell of the same samples."""
    stream = "train" if isinstance(record, StepRecord) else record.stream
    state = facts.begin.streams.get(stream)
    if state is None:
        return None
    try:
        segment = state.segments.at_step(state.segments.step_of(record.position))
    except ValueError:
        return None  # before the first segment: not a line of ours
    return (
        stream,
        step_of_record(record),
        isinstance(record, EvaluationRecord) and record.at_end,
        record.position,
        record.samples,
        segment.order_id,
        segment.order_position(record.position),
    )


def _name(record: Record) -> str:
    if isinstance(record, StepRecord):
        return f"step {record.step}"
    return f"the {record.stream} evaluation after step {record.after_step}"


def _equal(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _history(facts: AttemptFacts) -> list[tuple[int, str]]:
    """Return from which step on which numerics acted: what the weights at a step depend on."""
    begin = facts.begin
    origin = ""
    if begin.adopted is not None:
        origin = f"{begin.adopted.source} {begin.adopted.step}"
    elif begin.parent is not None and not begin.parent.is_continued:
        origin = f"{begin.parent.run_id} {begin.parent.chain}"
    changes = [(0, origin)]
    spans = [(span.first_step, span.numerics) for span in begin.spans]
    for first_step, numerics in [*spans, (begin.step + 1, facts.span_numerics)]:
        lasting, _, reset = numerics.partition(RESET)
        if reset:
            changes.append((first_step, reset))
        if changes[-1][1] != lasting:
            changes.append((first_step, lasting))
    return changes


def _departure(one: Sequence[tuple[int, str]], other: Sequence[tuple[int, str]]) -> int | None:
    """Return the first step whose numbers may differ; None if there is none."""
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            return min(mine[0], theirs[0])
    rest = [*one[len(other) :], *other[len(one) :]]
    return rest[0][0] if rest else None
