"""Looking up who consumed something, against every step looked at one by one."""

from collections import defaultdict

import pytest

from megatron.base.errors import DatasetError
from megatron.ledger.queries.consumer_rows import consumer_rows, step_totals
from megatron.ledger.queries.consumers import (
    ShardBytes,
    abandoned_courses,
    all_datasets,
    choose_dataset,
    consumers_of_bytes,
    consumers_of_document,
    find_shard,
    lineage_course,
)
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.run_view import open_run
from megatron.ledger.queries.samples import step_frame
from tests.ledger.queries.histories import blended_run, eventful_run


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    return open_run(eventful_run(tmp_path_factory.mktemp("eventful")).save)


@pytest.fixture(scope="module")
def blended(tmp_path_factory):
    return open_run(blended_run(tmp_path_factory.mktemp("blended")).save)


def looked_at_one_by_one(run, stream="train", last=None):
    """Return what every step consumed: {(dataset, document): [(step, position, start, stop)]}."""
    data = RunData(run.ledger.datasets)
    consumed = defaultdict(list)
    for step in range(1, (last or run.ledger.step) + 1):
        frame = step_frame(run, step, stream)
        parts = data.stream(frame.order).explain(frame.order_positions)
        for position, sample in zip(frame.positions, parts, strict=True):
            identity = frame.order.components[sample.component].dataset
            for part in sample.documents:
                consumed[identity, part.document].append((step, position, part.start, part.stop))
    return consumed


@pytest.mark.parametrize("name", ["eventful", "blended"])
def test_looking_up_a_document_gives_what_the_steps_say(name, request):
    run = request.getfixturevalue(name)
    data, course = RunData(run.ledger.datasets), lineage_course(run, "train")
    expected = looked_at_one_by_one(run)
    for identity, note in run.ledger.datasets.items():
        for document in range(note.num_documents):
            found = list(consumers_of_document(course, data, identity, document))
            rows = consumer_rows(run, found)
            found = sorted((row.step, row.position, row.start, row.stop) for row in rows)
            assert found == sorted(expected[identity, document])


def test_looking_up_bytes_gives_the_steps_whose_tokens_they_hold(eventful):
    data, course = RunData(eventful.ledger.datasets), lineage_course(eventful, "train")
    (identity,) = eventful.ledger.datasets
    dataset = data.dataset(identity)
    wanted = ShardBytes(identity, 501, 561)
    rows = consumer_rows(eventful, consumers_of_bytes(course, data, wanted))
    expected = set()
    for (_, document), entries in looked_at_one_by_one(eventful).items():
        for step, position, start, stop in entries:
            begin = int(dataset.pointers[document])
            touched = [t for t in range(start, stop) if 500 <= begin + 2 * t < 561]
            if touched:
                expected.add((step, position, document, min(touched), max(touched) + 1))
    assert {(row.step, row.position, row.document, row.start, row.stop) for row in rows} == expected


def test_a_whole_file_is_what_every_step_read(eventful, tmp_path):
    data, course = RunData(eventful.ledger.datasets), lineage_course(eventful, "train")
    (note,) = eventful.ledger.datasets.values()
    shard = find_shard(eventful.ledger.datasets, data, (tmp_path / note.path).with_suffix(".bin"))
    totals = step_totals(consumers_of_bytes(course, data, shard))
    assert [total.step for total in totals] == list(range(1, 25))
    assert [total.samples for total in totals] == [8] * 15 + [4] * 9
    assert [total.tokens for total in totals] == [8 * 17] * 15 + [4 * 17] * 9


def test_abandoned_steps_are_searched_when_asked_for(eventful):
    courses = list(abandoned_courses(eventful))
    assert [(one.abandoned_by.number, one.positions) for one in courses] == [
        (2, range(120, 160)),  # steps 16..20
        (3, range(80, 120)),  # steps 11..15
    ]
    data = RunData(all_datasets(courses))
    (identity,) = eventful.ledger.datasets
    found = [one for course in courses for one in consumers_of_document(course, data, identity, 30)]
    rows = consumer_rows(eventful, found)
    assert rows
    assert all(row.is_abandoned and row.attempt in (2, 3) for row in rows)
    again = consumer_rows(
        eventful,
        consumers_of_document(lineage_course(eventful, "train"), data, identity, 30),
    )
    # attempt 3 had read what attempt 2 reads on the lineage
    mine = {row.position for row in rows if row.attempt == 3}
    assert mine == {row.position for row in again if 80 <= row.position < 120}


def test_rows_say_which_rank_read_a_sample(eventful):
    data, course = RunData(eventful.ledger.datasets), lineage_course(eventful, "train")
    (identity,) = eventful.ledger.datasets
    for row in consumer_rows(eventful, consumers_of_document(course, data, identity, 30)):
        geometry = eventful.geometry_of(row.step)
        slot = geometry.slot(row.position - step_frame(eventful, row.step).positions.start)
        assert (row.micro_step, row.data_parallel_rank, row.row) == (
            slot.micro_step,
            slot.data_parallel_rank,
            slot.row,
        )


def test_steps_that_are_not_done_yet_can_be_searched(eventful):
    data = RunData(eventful.ledger.datasets)
    (identity,) = eventful.ledger.datasets
    course = lineage_course(eventful, "train", until=60)
    rows = consumer_rows(eventful, consumers_of_document(course, data, identity, 30))
    expected = looked_at_one_by_one(eventful, last=60)[identity, 30]
    assert [(row.step, row.position) for row in rows] == [entry[:2] for entry in sorted(expected)]


def test_evaluations_are_searched_in_their_own_stream(eventful):
    data, course = RunData(eventful.ledger.datasets), lineage_course(eventful, "valid")
    (identity,) = eventful.ledger.datasets
    expected = looked_at_one_by_one(eventful, "valid", last=6)
    for document in range(54, 60):
        rows = consumer_rows(eventful, consumers_of_document(course, data, identity, document))
        found = sorted((row.step, row.position, row.start, row.stop) for row in rows)
        assert found == sorted(expected[identity, document])


def test_a_dataset_is_chosen_by_path_name_or_identity(blended):
    notes = dict(blended.ledger.datasets)
    by_name = {note.path.rpartition("/")[2]: identity for identity, note in notes.items()}
    for name in ("large", "small"):
        assert choose_dataset(notes, name) == by_name[name]
        assert choose_dataset(notes, notes[by_name[name]].path) == by_name[name]
        assert choose_dataset(notes, by_name[name][:10]) == by_name[name]
    with pytest.raises(DatasetError, match=r"reads 2 datasets .* say which one with --dataset"):
        choose_dataset(notes, None)
    with pytest.raises(DatasetError, match="--dataset books names no dataset of the run"):
        choose_dataset(notes, "books")


def test_what_does_not_exist_is_an_error(eventful, tmp_path):
    data, course = RunData(eventful.ledger.datasets), lineage_course(eventful, "train")
    (identity,) = eventful.ledger.datasets
    with pytest.raises(DatasetError, match=r"has documents 0\.\.59, not 60"):
        list(consumers_of_document(course, data, identity, 60))
    with pytest.raises(DatasetError, match="is no token file of a dataset that the run reads"):
        find_shard(eventful.ledger.datasets, data, tmp_path / "other.bin")
