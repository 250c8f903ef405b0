"""Which checkpoints may be loaded: random histories of saves, crashes, roll-backs and damage.

The oracle is the history itself: every checkpoint is an object that knows its parent. What the code
under test gets is what the files would say, as far as the drawn damage leaves them readable.
"""

import random
from dataclasses import dataclass, field

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron.ledger.candidates import (
    AttemptHistory,
    Candidate,
    Directory,
    LedgerPlace,
    LineageSpan,
    ManifestPlace,
    NamedCommit,
    ordered_candidates,
)


@dataclass(frozen=True, eq=False)
class Saved:
    """A checkpoint as it was committed; ``attempt`` 0: NeoX's."""

    step: int
    parent: "Saved | None"
    attempt: int
    sequence: int | None = None  # None: before there were manifests
    has_ledger: bool = True

    @property
    def lineage(self) -> "list[Saved]":
        return [self, *([] if self.parent is None else self.parent.lineage)]

    @property
    def spans(self) -> tuple[LineageSpan, ...]:
        """What its ledger says, worked out from its ancestors."""
        newest_of_attempt = {}
        for one in reversed(self.lineage):
            newest_of_attempt[one.attempt] = one
        return tuple(
            LineageSpan.adopted(one.step) if attempt == 0 else _span(one)
            for attempt, one in newest_of_attempt.items()
        )


def _span(newest: Saved) -> LineageSpan:
    before = next((one.step for one in newest.lineage if one.attempt != newest.attempt), 0)
    return LineageSpan(newest.attempt, before + 1, newest.step)


@dataclass(eq=False)
class Attempt:
    number: int
    loaded: Saved | None
    committed: list[Saved] = field(default_factory=list)


class History:
    """A save directory through several launches."""

    def __init__(self, chance: random.Random, *, num_launches: int) -> None:
        self.chance = chance
        self.directories: dict[int, Saved] = {}
        self.attempts: list[Attempt] = []
        self.named: int | None = None  # the step in `latest`
        self.made: list[Saved] = []  # in the order of their commits
        self.first_with_manifests = chance.choice([1, 1, 2, 3])
        if chance.random() < 0.2:
            for step in sorted(chance.sample(range(1, 6), 2)):
                self._publish(Saved(step, None, attempt=0, has_ledger=False))
        for _ in range(num_launches):
            self._launch()

    @property
    def latest(self) -> Saved | None:
        return None if self.named is None else self.directories[self.named]

    def _launch(self) -> None:
        chance = self.chance
        source = self.latest
        if source is not None and chance.random() < 0.3:  # its ancestor: it was damaged
            there = [one for one in source.lineage if self.directories.get(one.step) is one]
            source = chance.choice(there) if there else source
        elif self.directories and chance.random() < 0.2:  # iteration: N, abandoned or not
            source = chance.choice(list(self.directories.values()))
        attempt = Attempt(len(self.attempts) + 1, source)
        self.attempts.append(attempt)
        is_sequenced = attempt.number >= self.first_with_manifests
        before = source
        for _ in range(chance.randrange(4)):
            step = (0 if before is None else before.step) + chance.randrange(1, 4)
            sequence = 1 + max((one.sequence or 0 for one in self.made), default=0)
            saved = Saved(step, before, attempt.number, sequence if is_sequenced else None)
            crash = chance.choice(["", "", "", "", "before latest", "before the attempt knows"])
            named = self.named
            self._publish(saved)
            if crash == "before latest":
                self.named = named
            if crash:
                return
            attempt.committed.append(saved)
            before = saved
            if chance.random() < 0.2:  # retention
                for old in saved.lineage[2:]:
                    if self.directories.get(old.step) is old:
                        del self.directories[old.step]

    def _publish(self, saved: Saved) -> None:
        self.directories[saved.step] = saved
        self.named = saved.step
        self.made.append(saved)


@dataclass
class Damage:
    """What can't be read any more."""

    latest: bool
    manifests: set[int]  # steps
    ledgers: set[int]
    attempts: set[int]  # numbers
    directories: set[int]  # steps


def draw_damage(chance: random.Random, history: History, *, severity: float) -> Damage:
    def some(things):
        return {one for one in things if chance.random() < severity}

    steps = list(history.directories)
    return Damage(
        latest=chance.random() < severity,
        manifests=some(steps),
        ledgers=some(steps),
        attempts=some(attempt.number for attempt in history.attempts),
        directories=some(steps) if chance.random() < 0.5 else set(),
    )


class Seen:
    """What a reader finds after the damage."""

    def __init__(self, history: History, damage: Damage) -> None:
        self.history = history
        self.there = {
            step: saved
            for step, saved in history.directories.items()
            if step not in damage.directories
        }
        self.manifests = {
            step: saved
            for step, saved in self.there.items()
            if saved.sequence is not None and step not in damage.manifests
        }
        self.ledgers = {
            step: saved
            for step, saved in self.there.items()
            if saved.has_ledger and step not in damage.ledgers
        }
        self.attempts = [one for one in history.attempts if one.number not in damage.attempts]
        named = history.latest
        usable = named is not None and named.step in self.there and not damage.latest
        self.latest = self.there[named.step] if usable and named is not None else None

    def candidates(self) -> list[Candidate]:
        return ordered_candidates(
            None if self.latest is None else self.latest.step,
            [self._directory(step) for step in self.there],
            [self._attempt(attempt) for attempt in self.attempts],
        )

    @property
    def tip(self) -> Saved | None:
        """What should be loaded if it is good."""
        ours = [saved for saved in self.history.made if saved.attempt]
        return self.latest or (ours[-1] if ours else None)

    @property
    def expected(self) -> list[int]:
        lineage = [] if self.tip is None else self.tip.lineage
        return [saved.step for saved in lineage if self.there.get(saved.step) is saved]

    def is_enough(self) -> bool:
        """Whether what is readable tells of every commit that matters."""
        if self.tip is None:
            return True
        with_spans = {*self.ledgers.values()}
        with_spans |= {saved for attempt in self.attempts for saved in attempt.committed}
        by_manifest = set(self.manifests.values())
        told = by_manifest | with_spans
        # A manifest can't name a parent that has no sequence.
        linked = with_spans | {one for one in by_manifest if not _follows_unsequenced(one)}
        there = {saved for saved in self.there.values() if saved.attempt}
        lineage = {saved for saved in self.tip.lineage if saved.attempt}
        return (
            there <= told
            and (self.tip in told or not there)
            and (lineage <= linked or self.tip in with_spans)
        )

    def _directory(self, step: int) -> Directory:
        manifest, ledger = self.manifests.get(step), self.ledgers.get(step)
        return Directory(
            step=step,
            manifest=None
            if manifest is None
            else ManifestPlace(
                sequence=manifest.sequence, attempt=manifest.attempt, parent=_sequence(manifest)
            ),
            ledger=None
            if ledger is None
            else LedgerPlace(
                sequence=ledger.sequence, parent=_sequence(ledger), spans=ledger.spans
            ),
        )

    def _attempt(self, attempt: Attempt) -> AttemptHistory:
        loaded = attempt.loaded
        return AttemptHistory(
            number=attempt.number,
            loaded=None if loaded is None else NamedCommit(loaded.step, loaded.sequence),
            committed=tuple(NamedCommit(one.step, one.sequence) for one in attempt.committed),
            spans=() if loaded is None else loaded.spans,
        )


def _follows_unsequenced(saved: Saved) -> bool:
    return saved.parent is not None and saved.parent.sequence is None


def _sequence(saved: Saved) -> int | None:
    return None if saved.parent is None else saved.parent.sequence


histories = st.builds(
    lambda seed, launches: History(random.Random(seed), num_launches=launches),
    st.integers(0, 2**32),
    st.integers(1, 6),
)


@given(histories)
def test_undamaged_files_give_latest_and_its_ancestors(history):
    seen = Seen(history, Damage(False, set(), set(), set(), set()))
    assert [one.step for one in seen.candidates()] == seen.expected


@settings(max_examples=500)
@given(histories, st.integers(0, 2**32), st.sampled_from([0.1, 0.3, 0.6]))
def test_the_lineage_is_exact_while_each_commit_is_told_by_one_source(history, seed, severity):
    seen = Seen(history, draw_damage(random.Random(seed), history, severity=severity))
    assume(seen.is_enough())
    found = seen.candidates()
    assert [one.step for one in found] == seen.expected
    assert all(one.is_ancestor for one in found)
    for candidate in found:
        assert candidate.sequence == seen.there[candidate.step].sequence


@settings(max_examples=500)
@given(histories, st.integers(0, 2**32), st.sampled_from([0.3, 0.6, 0.9]))
def test_whatever_is_damaged_latest_comes_first_and_nothing_known_as_abandoned_comes_at_all(
    history, seed, severity
):
    seen = Seen(history, draw_damage(random.Random(seed), history, severity=severity))
    found = seen.candidates()
    steps = [one.step for one in found]
    assert len(set(steps)) == len(steps)
    assert set(steps) <= set(seen.there)
    if seen.latest is not None:
        assert steps[0] == seen.latest.step
    sequences = [one.sequence for one in found if one.sequence is not None]
    assert sequences == sorted(sequences, reverse=True)
    for later in seen.manifests.values():
        before = 0 if later.parent is None else later.parent.sequence or 0
        for step in steps[1:]:
            sequence = seen.there[step].sequence
            is_known = step in seen.manifests or step in seen.ledgers
            assert not (is_known and sequence and before < sequence < later.sequence)


def test_commits_of_a_script_that_records_nothing_are_a_lineage_too():
    directories = [
        Directory(step=step, manifest=ManifestPlace(sequence=step, attempt=None, parent=parent))
        for step, parent in [(1, None), (2, 1), (3, 1)]
    ]
    assert [one.step for one in ordered_candidates(None, directories, [])] == [3, 1]
