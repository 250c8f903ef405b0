"""Which checkpoints a launch may go on from, the best first. Values in, values out.

A *commit* is the publication of a checkpoint. Every commit into a directory has a sequence number;
its *parent* is the commit that its attempt went on from, or its previous one. Three sources tell of
that, so that one which was damaged or deleted isn't missed:

    manifest.json        sequence, parent and attempt of the checkpoint that it lies in
    ledger.json          sequence, parent, and which attempts took which steps of the lineage
    attempts/NNNN.json   the checkpoint that the attempt loaded, those it committed, and its spans

The order is: the checkpoint that ``latest`` names, then its ancestors, newest first. Without a
usable ``latest`` the newest commit stands for it. A commit that isn't an ancestor was abandoned and
is never a candidate. Only where no source tells a commit's parent does the sequence alone decide,
among those that no later commit is known to have abandoned.

Checkpoints of an earlier release have no sequence, and NeoX's belong to no attempt. They get
numbers below 1 here, in the order they were made.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

__all__ = [
    "AttemptHistory",
    "Candidate",
    "Directory",
    "LedgerPlace",
    "LineageSpan",
    "ManifestPlace",
    "NamedCommit",
    "ordered_candidates",
]

FOREIGN = 0
"""Stands for the attempt that wrote NeoX's checkpoints; ours count from 1."""
UNRECORDED = -1
"""Stands for an attempt of ours that kept no ledger."""


@dataclass(frozen=True)
class LineageSpan:
    """Steps of a lineage that one attempt took."""

    attempt: int
    first_step: int
    last_step: int  # inclusive; first_step - 1 if it took none

    @classmethod
    def adopted(cls, step: int) -> Self:
        """Return what stands for the steps before NeoX's checkpoint of ``step`` was adopted."""
        return cls(FOREIGN, step + 1, step)

    def covers(self, attempt: int, step: int) -> bool:
        """Whether the checkpoint that ``attempt`` saved after ``step`` is on the lineage."""
        return attempt == self.attempt and self.first_step - 1 <= step <= self.last_step


@dataclass(frozen=True, kw_only=True)
class ManifestPlace:
    """What a readable manifest says of its checkpoint."""

    sequence: int
    attempt: int | None
    parent: int | None  # sequence; None: no earlier one with a sequence


@dataclass(frozen=True, kw_only=True)
class LedgerPlace:
    """What a readable ledger says of its checkpoint."""

    sequence: int | None  # None: of a release that gave none
    parent: int | None
    spans: tuple[LineageSpan, ...]  # of this run, oldest first


@dataclass(frozen=True, kw_only=True)
class Directory:
    """A ``global_stepN``; None stands for what is missing, unreadable or of another step."""

    step: int
    manifest: ManifestPlace | None = None
    ledger: LedgerPlace | None = None


@dataclass(frozen=True)
class NamedCommit:
    """A commit as an attempt names it."""

    step: int
    sequence: int | None  # None: of a release that gave none, or NeoX's


@dataclass(frozen=True, kw_only=True)
class AttemptHistory:
    """What a readable ``attempts/NNNN.json`` says."""

    number: int
    loaded: NamedCommit | None  # None: nothing, or a checkpoint of another directory
    committed: tuple[NamedCommit, ...] = ()  # oldest first
    spans: tuple[LineageSpan, ...] = ()  # of the checkpoint that was loaded


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that may be loaded."""

    step: int
    sequence: int | None = None  # None: it has none, or nothing tells
    is_ancestor: bool = True
    """False: no source tells where it stands; its commit sequence alone put it here."""


def ordered_candidates(
    latest: int | None, directories: Iterable[Directory], attempts: Iterable[AttemptHistory]
) -> list[Candidate]:
    """Return the checkpoints that may be loaded, in the order in which they are tried.

    Args:
        latest: the step that ``latest`` names; None if it is missing or unreadable.
        directories: every ``global_stepN`` there is.
        attempts: those whose files can be read.

    Example:
        >>> attempts = [
        ...     AttemptHistory(number=1, loaded=None, committed=(first := NamedCommit(10, 1),)),
        ...     AttemptHistory(number=2, loaded=first, committed=(NamedCommit(20, 2),)),
        ... ]
        >>> found = ordered_candidates(20, [Directory(step=10), Directory(step=20)], attempts)
        >>> [candidate.step for candidate in found]
        [20, 10]
    """
    found = {directory.step: directory for directory in directories}
    commits = _Commits(found.values(), sorted(attempts, key=lambda attempt: attempt.number))
    if latest not in found:
        newest = commits.newest()
        return [] if newest is None else list(commits.lineage(newest))
    number = commits.number_of(found[latest])
    if number is not None:
        return list(commits.lineage(number))
    return [Candidate(latest), *commits.unrelated()]


class _Commits:
    """All commits that anything tells of, by number: the sequence, or below 1 without one."""

    def __init__(
        self, directories: Collection[Directory], attempts: Sequence[AttemptHistory]
    ) -> None:
        self._unsequenced = _unsequenced(directories, attempts)
        # number -> (attempt, step)
        self._writers = {number: writer for writer, number in self._unsequenced.items()}
        self._parents: dict[int, int | None] = {}  # not in here: nothing tells
        self._spans: dict[int, tuple[LineageSpan, ...]] = {}  # that led to it
        self._present: dict[int, int] = {}  # number -> step
        self._newest_of_step: dict[int, int] = {}  # step -> number, as attempts know
        for attempt in attempts:
            self._note_attempt(attempt)
        for directory in directories:
            self._note_directory(directory)

    def number_of(self, directory: Directory) -> int | None:
        """Return the number of the commit in a directory; None if nothing tells."""
        manifest, ledger, step = directory.manifest, directory.ledger, directory.step
        if manifest is not None:
            return manifest.sequence
        if ledger is not None:
            if ledger.sequence is not None:
                return ledger.sequence
            return self._unsequenced[_writer(ledger.spans, step)]
        if step in self._newest_of_step:
            return self._newest_of_step[step]
        return self._unsequenced.get((FOREIGN, step))

    def newest(self) -> int | None:
        """Return the run's newest commit, whether or not it is still there."""
        ours = (number for number, (attempt, _) in self._writers.items() if attempt != FOREIGN)
        return max(ours, default=None)

    def lineage(self, newest: int, *, is_told: bool = True) -> Iterator[Candidate]:
        """Yield ``newest`` and its ancestors, as far as they are there."""
        number: int | None = newest
        passed: list[int] = []
        while number is not None:
            if number in self._present:
                sequence = number if number > 0 else None
                yield Candidate(self._present[number], sequence, is_told)
            passed.append(number)
            number, is_link_told = self._before(passed)
            is_told = is_told and is_link_told

    def unrelated(self) -> Iterator[Candidate]:
        """Yield what may be loaded instead of a checkpoint that nothing tells of."""
        number = self._newest_not_abandoned(None)
        return iter(()) if number is None else self.lineage(number, is_told=False)

    def _before(self, passed: Sequence[int]) -> tuple[int | None, bool]:
        """Return the commit before the last one that was passed, and whether a source tells."""
        last = passed[-1]
        parent = self._parents.get(last)
        if parent is not None:
            return parent, True
        for number in reversed(passed):
            if number in self._spans:
                return self._newest_on(self._spans[number], passed), True
        if last in self._parents:
            return None, True
        return self._newest_not_abandoned(last), False

    def _newest_on(self, spans: Sequence[LineageSpan], passed: Sequence[int]) -> int | None:
        """Return the newest commit on ``spans`` that is there and before all that were passed."""
        # Along a lineage steps rise; numbers may not if it isn't known who wrote something.
        before = min(self._writers[one][1] for one in passed if one in self._writers)
        found = {
            step: number
            for number, step in self._present.items()
            if step < before and any(span.covers(*self._writers[number]) for span in spans)
        }
        return found[max(found)] if found else None

    def _newest_not_abandoned(self, before: int | None) -> int | None:
        """Return the commit with the highest number that is there, below ``before``."""
        return max(
            (
                number
                for number in self._present
                if (before is None or number < before) and not self._is_abandoned(number)
            ),
            default=None,
        )

    def _is_abandoned(self, number: int) -> bool:
        """Whether a later commit went on from an earlier one; NeoX's are never guessed at."""
        if self._writers[number][0] == FOREIGN:
            return True
        return any((parent or 0) < number < child for child, parent in self._parents.items())

    def _note_attempt(self, attempt: AttemptHistory) -> None:
        before = self._loaded(attempt)
        for commit in attempt.committed:
            number = commit.sequence
            if number is None:
                number = self._unsequenced[attempt.number, commit.step]
            self._writers[number] = attempt.number, commit.step
            self._newest_of_step[commit.step] = number
            # Whatever the attempt did before is on the way to this commit.
            own = LineageSpan(attempt.number, 1, commit.step)
            self._spans[number] = (*attempt.spans, own)
            self._note_parent(number, before)
            before = number

    def _loaded(self, attempt: AttemptHistory) -> int | None:
        if attempt.loaded is None or attempt.loaded.sequence is not None:
            return None if attempt.loaded is None else attempt.loaded.sequence
        return self._unsequenced[_writer(attempt.spans, attempt.loaded.step)]

    def _note_directory(self, directory: Directory) -> None:
        number, step = self.number_of(directory), directory.step
        if number is None:
            return
        manifest, ledger = directory.manifest, directory.ledger
        self._present[number] = step
        writer = (FOREIGN, step) if ledger is None else _writer(ledger.spans, step)
        if manifest is not None:
            writer = (UNRECORDED if manifest.attempt is None else manifest.attempt), step
        self._writers.setdefault(number, writer)
        if manifest is not None:
            self._note_parent(number, manifest.parent)
        if ledger is not None:
            self._spans.setdefault(number, ledger.spans)
            if ledger.sequence is not None:
                self._note_parent(number, ledger.parent)

    def _note_parent(self, number: int, parent: int | None) -> None:
        """Note what one source says: a parent that one of them names is the parent."""
        if parent is None:
            self._parents.setdefault(number, None)
        elif parent < number:  # else that source is worth nothing
            self._parents[number] = parent


def _unsequenced(
    directories: Iterable[Directory], attempts: Sequence[AttemptHistory]
) -> dict[tuple[int, int], int]:
    """Return the numbers of all commits without a sequence, by (attempt, step)."""
    ledgers = [(one.ledger, one.step) for one in directories if one.ledger is not None]
    found = {
        (attempt.number, commit.step)
        for attempt in attempts
        for commit in attempt.committed
        if commit.sequence is None
    }
    found |= {_writer(ledger.spans, step) for ledger, step in ledgers if ledger.sequence is None}
    found |= {
        _writer(attempt.spans, attempt.loaded.step)
        for attempt in attempts
        if attempt.loaded is not None and attempt.loaded.sequence is None
    }
    all_spans = [*(ledger.spans for ledger, _ in ledgers), *(one.spans for one in attempts)]
    found |= {
        (FOREIGN, span.last_step)
        for spans in all_spans
        for span in spans
        if span.attempt == FOREIGN
    }
    return {identity: index + 1 - len(found) for index, identity in enumerate(sorted(found))}


def _writer(spans: Sequence[LineageSpan], step: int) -> tuple[int, int]:
    """Return who saved the checkpoint of ``step`` that ``spans`` led to."""
    return (spans[-1].attempt if spans else FOREIGN, step)
