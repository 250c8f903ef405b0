"""Which samples a step consumes, against bytes read by hand."""

import json
import shutil

import numpy as np
import pytest

from megatron.base.errors import DatasetError, RunDirectoryError
from megatron.ledger.attempts import EvaluationRecord, StepRecord
from megatron.ledger.digests import digest_text, sample_digest
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.run_view import open_run
from megatron.ledger.queries.samples import recorded_line, step_draws, step_frame, step_slots
from tests.ledger.queries.histories import blended_run, eventful_run
from tests.ledger.queries.simulated_run import ONE_RANK, TWO_RANKS, write_corpus


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    return eventful_run(tmp_path_factory.mktemp("eventful"))


@pytest.fixture(scope="module")
def blended(tmp_path_factory):
    return blended_run(tmp_path_factory.mktemp("blended"))


def tokens_by_hand(parts):
    """Read a sample's bytes from the files its explanation names."""
    content = b"".join(
        piece.path.read_bytes()[piece.start : piece.stop]
        for part in parts.documents
        for piece in part.bytes
    )
    return np.frombuffer(content, dtype=np.uint16)


@pytest.mark.parametrize("name", ["eventful", "blended"])
def test_the_bytes_that_are_named_give_every_steps_recorded_digest(name, request):
    run = open_run(request.getfixturevalue(name).save)
    data = RunData(run.ledger.datasets)
    for step in range(1, run.ledger.step + 1):
        frame = step_frame(run, step)
        parts = data.stream(frame.order).explain(frame.order_positions)
        total = sum(
            sample_digest(tokens_by_hand(sample), position)
            for sample, position in zip(parts, frame.positions, strict=True)
        )
        record = recorded_line(run, frame)
        assert isinstance(record, StepRecord)
        assert digest_text(total) == record.digest
        assert frame.stage == "recorded"


def test_every_step_follows_the_one_before(eventful):
    run = open_run(eventful.save)
    positions = [p for step in range(1, 25) for p in step_frame(run, step).positions]
    assert positions == list(range(15 * 8 + 9 * 4))


def test_each_sample_of_a_step_has_a_place_of_its_own(eventful):
    run = open_run(eventful.save)
    for step, geometry in ((15, TWO_RANKS), (16, ONE_RANK)):
        frame = step_frame(run, step)
        assert frame.geometry == geometry
        slots = step_slots(frame)
        assert len(set(slots)) == geometry.global_batch_size == len(frame.positions)
        for offset, slot in enumerate(slots):
            expected = geometry.slot(offset)
            assert slot == (expected.micro_step, expected.data_parallel_rank, expected.row)


def test_draws_need_no_data_and_agree_with_it(blended):
    run = open_run(blended.save)
    data = RunData(run.ledger.datasets)
    drawn: dict[str, list[int]] = {}
    for step in range(1, 19):
        frame = step_frame(run, step)
        draws = step_draws(frame.order, frame.order_positions)
        parts = data.stream(frame.order).explain(frame.order_positions)
        assert [draw.component for draw in draws] == [sample.component for sample in parts]
        for draw in draws:
            drawn.setdefault(frame.order.components[draw.component].key, []).append(draw.position)
    # over both changes of the weights, no dataset's sample is repeated or skipped
    assert len(drawn) == 2
    assert all(places == list(range(len(places))) for places in drawn.values())


def test_an_evaluation_is_counted_like_a_step_of_its_stream(eventful):
    run = open_run(eventful.save)
    frame = step_frame(run, 4, "valid")
    record = recorded_line(run, frame)
    assert isinstance(record, EvaluationRecord)
    assert (record.after_step, record.position) == (16, frame.positions.start)
    assert frame.stage == "recorded"
    assert frame.geometry == ONE_RANK
    assert step_frame(run, 40, "valid").stage == "planned"


def test_steps_that_are_not_done_yet_are_planned(eventful):
    run = open_run(eventful.save)
    frame = step_frame(run, 25)
    assert frame.stage == "planned"
    assert frame.positions.start == step_frame(run, 24).positions.stop
    assert frame.geometry == ONE_RANK


def test_a_copied_checkpoint_alone_tells_everything_but_what_was_recorded(eventful, tmp_path):
    shutil.copytree(eventful.save / "global_step24", tmp_path / "global_step24")
    alone, beside = open_run(tmp_path / "global_step24"), open_run(eventful.save)
    for step in range(1, 25):
        mine, whole = step_frame(alone, step), step_frame(beside, step)
        assert mine.positions == whole.positions
        assert mine.geometry == whole.geometry
        assert step_slots(mine) == step_slots(whole)
        assert mine.stage == "unrecorded"
        assert recorded_line(alone, mine) is None


def test_a_checkpoint_is_asked_about_its_own_lineage(eventful):
    run = open_run(eventful.save / "global_step15")
    assert run.ledger.step == 15
    assert len(step_frame(run, 20).positions) == 8  # as it would have gone on
    assert step_frame(run, 20).stage == "planned"


def test_a_run_that_has_no_checkpoint_yet_can_be_asked(tmp_path):
    from tests.ledger.queries.simulated_run import SimulatedRun

    run = SimulatedRun(tmp_path / "save", [write_corpus(tmp_path / "corpus")])
    run.launch(7, stop=None)
    view = open_run(run.save)
    assert view.ledger.step == 5  # what has been written down
    assert step_frame(view, 5).stage == "recorded"


def test_data_that_was_moved_is_found_by_its_content(tmp_path):
    run = eventful_run(tmp_path / "then")
    view = open_run(run.save)
    frame = step_frame(view, 3)
    before = RunData(view.ledger.datasets).read(frame.order, np.arange(3))[0]
    for suffix in ("bin", "idx"):
        shutil.move(tmp_path / f"then/corpus.{suffix}", tmp_path / f"elsewhere.{suffix}")
    with pytest.raises(DatasetError, match="is not there; if it lies elsewhere now, name its"):
        RunData(view.ledger.datasets).stream(frame.order)
    other = write_corpus(tmp_path / "other", seed=9)
    moved = RunData(view.ledger.datasets, [other, str(tmp_path / "elsewhere")])
    assert np.array_equal(moved.read(frame.order, np.arange(3))[0], before)


def test_data_that_has_changed_is_not_taken_for_what_was_read(tmp_path):
    run = eventful_run(tmp_path)
    view = open_run(run.save)
    write_corpus(tmp_path / "corpus", seed=5)
    with pytest.raises(DatasetError, match="is not what the run read: its content was"):
        RunData(view.ledger.datasets).stream(step_frame(view, 1).order)


def test_a_stream_that_the_run_does_not_have_is_an_error(eventful):
    with pytest.raises(RunDirectoryError, match="the run reads no test data, only train, valid"):
        step_frame(open_run(eventful.save), 1, "test")


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(RunDirectoryError, match="neither attempts nor checkpoints"):
        open_run(tmp_path)
    with pytest.raises(RunDirectoryError, match="is no directory"):
        open_run(tmp_path / "missing")


def test_an_order_that_the_ledger_lacks_is_an_error(eventful, tmp_path):
    checkpoint = tmp_path / "global_step24"
    shutil.copytree(eventful.save / "global_step24", checkpoint)
    content = json.loads((checkpoint / "ledger.json").read_text())
    content["orders"] = {}
    (checkpoint / "ledger.json").write_text(json.dumps(content))
    with pytest.raises(RunDirectoryError, match="but doesn't describe it; the file was edited"):
        step_frame(open_run(checkpoint), 1)
