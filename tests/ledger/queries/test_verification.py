"""What verify finds in runs that are whole, edited, misread, or without their data."""

import dataclasses
import shutil

import pytest

from megatron.base.errors import RunDirectoryError
from megatron.ledger.ledger_file import read_ledger, write_ledger
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.run_view import open_run
from megatron.ledger.queries.verification import Extent, verify
from megatron.stream.segments import SegmentTable
from tests.ledger.queries.histories import blended_run, eventful_run
from tests.ledger.queries.simulated_run import SimulatedRun, write_corpus


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    return eventful_run(tmp_path_factory.mktemp("eventful"))


@pytest.fixture
def copied(eventful, tmp_path):
    """A copy of the run directory that a test may damage."""
    save = tmp_path / "save"
    shutil.copytree(eventful.save, save)
    return save


def verified(path, extent=None):
    run = open_run(path)
    return verify(run, RunData(run.ledger.datasets), extent or Extent())


def change_lines(path, change):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")


def line_of(lines, step):
    return next(i for i, line in enumerate(lines) if line.startswith(f'{{"step": {step}, '))


@pytest.mark.parametrize("history", [eventful_run, blended_run])
def test_a_run_with_a_past_is_whole(history, tmp_path):
    run = history(tmp_path)
    report = verified(run.save)
    last = open_run(run.save).ledger.step
    assert report.exit_status == 0
    assert report.problems == report.unknown == report.warnings == ()
    assert report.recorded == last
    assert report.recomputed == tuple(range(1, last + 1))
    assert report.recomputed_evaluations == report.evaluations == last // 4


def test_a_digit_that_was_changed_is_named(copied):
    path = copied / "attempts" / "0002.jsonl"

    def change(lines):
        at = line_of(lines, 13)
        lines[at] = lines[at].replace('"loss": 0.0769', '"loss": 0.0768')
        return lines

    change_lines(path, change)
    report = verified(copied)
    assert report.exit_status == 1
    assert (report.problems[0].check, report.problems[0].step) == ("lines", 13)
    assert report.problems[0].path == path


def test_a_line_that_was_dropped_is_named(copied):
    def drop(lines):
        del lines[line_of(lines, 7)]
        return lines

    change_lines(copied / "attempts" / "0001.jsonl", drop)
    report = verified(copied)
    assert report.exit_status == 1
    assert report.problems[0].step == 7


def test_lines_that_changed_places_are_named(copied):
    def swap(lines):
        one, other = line_of(lines, 2), line_of(lines, 3)
        lines[one], lines[other] = lines[other], lines[one]
        return lines

    change_lines(copied / "attempts" / "0001.jsonl", swap)
    report = verified(copied)
    assert report.exit_status == 1
    assert report.problems[0].step == 2


def test_lines_that_were_cut_off_before_a_checkpoint_are_named(copied):
    change_lines(copied / "attempts" / "0004.jsonl", lambda lines: lines[:4])
    report = verified(copied)
    assert report.exit_status == 1
    assert report.problems[0].check == "lines"


def test_a_step_that_read_other_samples_is_named(tmp_path):
    run = SimulatedRun(tmp_path / "save", [write_corpus(tmp_path / "corpus")])
    run.launch(9, saves=[9], misread_step=6)
    report = verified(run.save)
    assert report.exit_status == 1
    assert [(one.check, one.step) for one in report.problems] == [("digests", 6)]
    assert "its order and the data give digest" in report.problems[0].text
    # only what is computed anew can be found
    assert verified(run.save, Extent(steps=range(1, 6))).exit_status == 0


def test_a_step_done_again_with_other_samples_is_named(tmp_path):
    run = SimulatedRun(tmp_path / "save", [write_corpus(tmp_path / "corpus")])
    run.launch(10, saves=[5], misread_step=8, stop=None)
    run.launch(7, saves=[7], stop="signal")
    again = open_run(run.save)
    assert verify(again, None, Extent()).exit_status == 0
    run.eval_interval = 100
    with pytest.raises(RunDirectoryError, match="step 8 was done by attempt 1 too"):
        run.launch(10, iteration=5)
    report = verify(open_run(run.save), None, Extent())
    assert report.exit_status == 1
    assert {problem.check for problem in report.problems} == {"repetition"}


def test_a_segment_that_repeats_samples_is_named(eventful, tmp_path):
    checkpoint = tmp_path / "global_step24"
    shutil.copytree(eventful.save / "global_step24", checkpoint)
    ledger = read_ledger(checkpoint)
    train = ledger.streams["train"]
    first, second = train.segments.segments
    second = dataclasses.replace(second, first_order_position=second.first_order_position - 3)
    train = dataclasses.replace(train, segments=SegmentTable((first, second)))
    write_ledger(
        checkpoint, dataclasses.replace(ledger, streams={**ledger.streams, "train": train})
    )
    report = verify(open_run(checkpoint), None, Extent())
    problem = report.problems[0]
    assert (problem.check, problem.step) == ("positions", 16)
    assert "3 samples are repeated" in problem.text


@pytest.mark.parametrize(
    ("stream", "change", "said"),
    [
        (
            "train",
            {"next_position": 1},
            "the train stream goes on at position 1, but step 24 ended",
        ),
        ("valid", {"next_position": 1}, "the valid stream goes on at position 1, where "),
        ("train", {"cursors": 7}, "but its cursor is noted as 7"),
    ],
)
def test_a_checkpoint_that_would_go_on_elsewhere_is_named(copied, stream, change, said):
    checkpoint = copied / "global_step24"
    ledger = read_ledger(checkpoint)
    state = ledger.streams[stream]
    if "cursors" in change:
        change = {"cursors": dict.fromkeys(state.cursors, change["cursors"])}
    streams = {**ledger.streams, stream: dataclasses.replace(state, **change)}
    assert verified(checkpoint).exit_status == 0
    write_ledger(checkpoint, dataclasses.replace(ledger, streams=streams))
    report = verified(checkpoint)
    assert report.exit_status == 1
    assert {(one.check, one.step) for one in report.problems} == {("positions", 24)}
    assert said in report.problems[0].text


def test_a_change_that_was_accepted_is_reported_as_a_break(tmp_path):
    run = SimulatedRun(tmp_path / "save", [write_corpus(tmp_path / "corpus")])
    run.launch(6, saves=[6], train_iters=12, stop="signal")
    run.settings["seed"] = 77
    run.launch(12, saves=[12], accept=["seed"])
    report = verified(run.save)
    assert report.exit_status == 0
    assert [(one.after_step, one.keys) for one in report.accepted] == [(6, ("seed",))]
    assert report.recomputed == tuple(range(1, 13))


def test_a_checkpoint_alone_is_compared_by_its_sums(eventful, tmp_path):
    checkpoint = tmp_path / "global_step24"
    shutil.copytree(eventful.save / "global_step24", checkpoint)
    report = verified(checkpoint)
    assert report.exit_status == 2
    assert report.problems == ()
    assert report.unknown == ("the lines of steps 1..10, 11..15, 16..24 are not here",)
    assert report.recomputed == tuple(range(1, 25))

    ledger = read_ledger(checkpoint)
    spans = (*ledger.spans[:2], dataclasses.replace(ledger.spans[2], digest_sum="0" * 16))
    write_ledger(checkpoint, dataclasses.replace(ledger, spans=spans))
    (problem,) = verified(checkpoint).problems
    assert (problem.check, problem.step) == ("digests", 16)


def test_missing_data_leaves_the_digests_unknown(copied):
    run = open_run(copied)
    notes = {
        identity: dataclasses.replace(note, path="/nowhere/corpus")
        for identity, note in run.ledger.datasets.items()
    }
    report = verify(run, RunData(notes), Extent())
    assert report.exit_status == 2
    (unknown,) = report.unknown
    assert unknown.startswith(
        "the digests of steps 1..24 and of the evaluations after steps 4, 8, 12, 16, 20 and others "
        "up to 24 (6 in all) could not be computed: dataset /nowhere/corpus (60 documents"
    )
    assert report.recorded == 24


def test_steps_after_data_was_changed_are_computed_the_others_named(tmp_path):
    """Changed where it lies, as accepted: nobody has the old content any more."""
    run = SimulatedRun(tmp_path / "save", [write_corpus(tmp_path / "corpus")])
    run.launch(6, saves=[6], train_iters=12, stop="signal")
    write_corpus(tmp_path / "corpus", seed=1)
    run.launch(12, saves=[12], accept=["data"])
    report = verified(run.save)
    assert (report.exit_status, report.problems) == (2, ())
    assert report.recomputed == tuple(range(7, 13))
    (unknown,) = report.unknown
    assert unknown.startswith(
        "the digests of steps 1..6 and of the evaluations after step 4 could not be computed: "
        f"{tmp_path / 'corpus'} is not what the run read: its content was "
    )
    assert verified(run.save, Extent(steps=range(7, 13))).exit_status == 0


def test_the_steps_that_are_computed_are_the_ones_asked_for(eventful):
    asked = Extent(steps=range(5, 9))
    assert verified(eventful.save, asked).recomputed == (5, 6, 7, 8)
    drawn = verified(eventful.save, Extent(sample=6, seed=3)).recomputed
    assert len(drawn) == 6
    assert drawn == verified(eventful.save, Extent(sample=6, seed=3)).recomputed
    assert drawn != verified(eventful.save, Extent(sample=6, seed=4)).recomputed
    run = open_run(eventful.save)
    assert verify(run, None, Extent()).recomputed == ()


def test_a_running_attempt_is_verified_up_to_its_last_line(copied):
    path = copied / "attempts" / "0004.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 25, "posi')
    report = verified(copied)
    assert report.exit_status == 0
    assert report.last_step == 24
