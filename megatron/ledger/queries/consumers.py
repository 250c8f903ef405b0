"""The way back: which steps consumed a document, or any byte of a range."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.ledger.attempt_facts import AttemptFacts
from megatron.ledger.ledger_file import DatasetNote, Ledger
from megatron.ledger.lineage import abandoned_steps
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.run_view import RunView
from megatron.stream.order_description import OrderDescription
from megatron.stream.orders import Occurrences
from megatron.stream.sample_stream import Stream
from megatron.stream.segments import Segment, SegmentTable

__all__ = [
    "Consumed",
    "Course",
    "ShardBytes",
    "abandoned_courses",
    "all_datasets",
    "choose_dataset",
    "consumers_of_bytes",
    "consumers_of_document",
    "find_shard",
    "lineage_course",
]


@dataclass(frozen=True)
class Course:
    """Consecutive positions of a stream that were consumed, and in which segments."""

    ledger: Ledger
    stream: str
    positions: range
    abandoned_by: AttemptFacts | None = None  # None: of the lineage


@dataclass(frozen=True)
class Consumed:
    """Where a course consumed what was asked for: one entry per document and sample."""

    course: Course
    segment: Segment
    order: OrderDescription
    component: int  # index into the order's components
    step: NDArray[np.int64]
    position: NDArray[np.int64]  # of the stream
    found: Occurrences  # its positions are those of the order

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class ShardBytes:
    """A range of a dataset's bytes, from the begin of the dataset."""

    identity: str
    start: int
    stop: int


def lineage_course(run: RunView, stream: str, *, until: int | None = None) -> Course:
    """Return what the lineage consumed of a stream, or will have when step ``until`` is done."""
    state = run.stream(stream)
    stop = state.next_position
    if until is not None:
        stop = max(stop, state.segments.positions(until).stop)
    return Course(run.ledger, stream, range(_first_position(state.segments), stop))


def abandoned_courses(run: RunView) -> Iterator[Course]:
    """Yield what steps consumed of the training stream that are no longer on the lineage."""
    if run.save is None:
        return
    for part in abandoned_steps(run.save, run.lineage):
        table = part.facts.begin.streams["train"].segments
        positions = range(
            table.positions(part.steps.first).start, table.positions(part.steps.last).stop
        )
        yield Course(part.facts.begin, "train", positions, part.facts)


def all_datasets(courses: Sequence[Course]) -> dict[str, DatasetNote]:
    """Return where the datasets of all courses were seen last; the first course's word counts."""
    notes: dict[str, DatasetNote] = {}
    for course in reversed(courses):
        notes |= course.ledger.datasets
    return notes


def choose_dataset(notes: dict[str, DatasetNote], name: str | None) -> str:
    """Return the identity of the dataset that a user means.

    Args:
        notes: the run's datasets.
        name: its path, the last part of its path, or the begin of its identity; None: the only one.

    Raises:
        DatasetError: none or several are meant.
    """
    known = ", ".join(sorted(note.path for note in notes.values()))
    if name is None:
        if len(notes) != 1:
            raise DatasetError(
                f"the run reads {len(notes)} datasets ({known}); say which one with --dataset"
            )
        return next(iter(notes))
    path = Path(name).resolve()
    meant = [one for one, note in notes.items() if Path(note.path).resolve() == path]
    if not meant:
        meant = [
            one
            for one, note in notes.items()
            if Path(note.path).name == name or one.startswith(name)
        ]
    if len(meant) != 1:
        number = "no dataset" if not meant else "several datasets"
        raise DatasetError(f"--dataset {name} names {number} of the run; it reads {known}")
    return meant[0]


def find_shard(notes: dict[str, DatasetNote], data: RunData, file: Path) -> ShardBytes:
    """Return what bytes of which dataset a token file holds.

    Args:
        notes: the run's datasets.
        data: where they lie.
        file: its path, or its name if no other file of the run has it.

    Raises:
        DatasetError: it is no file of any dataset of the run, or it may be several.
    """
    problems = []
    named: dict[Path, ShardBytes] = {}
    for identity in notes:
        try:
            shards = data.dataset(identity).tokens.shards
        except DatasetError as error:
            problems.append(str(error))
            continue
        for shard in shards:
            found = ShardBytes(identity, shard.start, shard.stop)
            if shard.path.resolve() == file.resolve():
                return found
            if shard.path.name == str(file):
                named.setdefault(shard.path.resolve(), found)
    if len(named) == 1:
        return next(iter(named.values()))
    if named:
        paths = ", ".join(map(str, sorted(named)))
        raise DatasetError(f"{file} is the name of several files: {paths}; name one by its path")
    known = ", ".join(sorted(note.path for note in notes.values()))
    missing = "".join(f"; {problem}" for problem in problems)
    raise DatasetError(
        f"{file} is no token file of a dataset that the run reads; it reads {known}{missing}"
    )


def consumers_of_document(
    course: Course, data: RunData, identity: str, document: int
) -> Iterator[Consumed]:
    """Yield where a course consumed any token of a document.

    Raises:
        DatasetError: the data isn't there, or has no such document.
    """
    num_documents = len(data.dataset(identity))
    if not 0 <= document < num_documents:
        raise DatasetError(
            f"{data.files(identity).prefix} has documents 0..{num_documents - 1}, not {document}"
        )
    return _consumers(
        course,
        data,
        identity,
        lambda stream, component, positions: stream.positions_of_document(
            component, document, positions
        ),
    )


def consumers_of_bytes(course: Course, data: RunData, wanted: ShardBytes) -> Iterator[Consumed]:
    """Yield where a course consumed any token that has a byte in a range.

    Raises:
        DatasetError: the data isn't there.
    """
    return _consumers(
        course,
        data,
        wanted.identity,
        lambda stream, component, positions: stream.positions_of_bytes(
            component, wanted.start, wanted.stop, positions
        ),
    )


def _consumers(
    course: Course,
    data: RunData,
    identity: str,
    find: Callable[[Stream, int, range], Occurrences],
) -> Iterator[Consumed]:
    for segment, positions in _pieces(course):
        order = course.ledger.orders[segment.order_id]
        shift = segment.first_order_position - segment.first_position
        places = range(positions.start + shift, positions.stop + shift)
        for component, described in enumerate(order.components):
            if described.dataset != identity:
                continue
            found = find(data.stream(order), component, places)
            if not len(found):
                continue
            position = found.position - shift
            step = segment.first_step + (position - segment.first_position) // segment.batch_size
            yield Consumed(course, segment, order, component, step, position, found)


def _pieces(course: Course) -> Iterator[tuple[Segment, range]]:
    """Yield the segments of a course with what of them it consumed."""
    segments = tuple(course.ledger.streams[course.stream].segments)
    ends = [*(segment.first_position for segment in segments[1:]), course.positions.stop]
    for segment, end in zip(segments, ends, strict=True):
        start = max(course.positions.start, segment.first_position)
        stop = min(course.positions.stop, end)
        if start < stop:
            yield segment, range(start, stop)


def _first_position(table: SegmentTable) -> int:
    return table.segments[0].first_position
