"""The recorder: lines wait for their digests, ledgers cover exactly what was written."""

import json
import shutil
from dataclasses import replace

import pytest

from megatron.base.errors import RunDirectoryError
from megatron.config.batch_geometry import BatchGeometry
from megatron.ledger.attempt_facts import (
    CommittedCheckpoint,
    LoadedCheckpoint,
    Stop,
    attempt_facts_path,
    instructed_attempts,
    is_finished,
    read_all_attempt_facts,
    read_attempt_facts,
)
from megatron.ledger.attempts import EvaluationRecord, StepRecord, read_attempt, read_lines
from megatron.ledger.digests import digest_text, digest_value
from megatron.ledger.instructions import Instruction
from megatron.ledger.ledger_file import ObeyedInstruction, read_ledger
from megatron.ledger.recorder import flush_interval
from tests.ledger.example_ledgers import small_ledger
from tests.ledger.recorded_runs import TestRun


def step_record(step, position=None, samples=4):
    position = (step - 1) * 4 if position is None else position
    return StepRecord(step, position, samples, 2.0, 1e-3, 1.5, False, 0.1)


def steps_in(run):
    return [record.step for record in read_attempt(run.lines_path)]


@pytest.mark.parametrize(("log_interval", "steps"), [(None, 10), (1, 1), (7, 7), (100, 10)])
def test_at_most_ten_steps_wait_for_their_digests(log_interval, steps):
    assert flush_interval(log_interval) == steps


def test_lines_are_written_once_their_digests_are_known(tmp_path):
    run = TestRun.start(tmp_path / "run")
    for step in (1, 2, 3):
        run.recorder.step(step_record(step))
    assert run.recorder.pending_steps == [1, 2, 3]
    run.recorder.flush({1: 11, 2: 12})
    assert steps_in(run) == [1, 2]
    run.recorder.flush()
    assert steps_in(run) == [1, 2]
    run.recorder.flush({3: 13})
    assert [one.digest for one in read_attempt(run.lines_path)] == [
        digest_text(digest) for digest in (11, 12, 13)
    ]


def test_a_number_that_the_lineage_knows_is_not_given_again(tmp_path):
    save = tmp_path / "run"
    run = TestRun.start(save)
    run.recorder.step(step_record(1))
    run.recorder.flush({1: 11})
    ledger = run.recorder.ledger(lambda stream, position: {}, evaluation_due=False)
    run.recorder.close("finished")
    shutil.rmtree(save / "attempts")  # lost, or not copied with the checkpoints
    assert TestRun.start(save, ledger).recorder.number == 2


def test_an_evaluation_is_written_after_the_steps_before_it(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.recorder.step(step_record(1))
    run.evaluate(1)
    run.recorder.step(step_record(2))
    assert list(read_lines(run.lines_path)) == []
    run.recorder.flush({1: 11, 2: 12})
    records = [line.record for line in read_lines(run.lines_path)]
    assert [type(record) for record in records] == [StepRecord, EvaluationRecord, StepRecord]


@pytest.mark.parametrize(
    "record", [step_record(2), step_record(1, position=4), step_record(1, samples=8)]
)
def test_a_step_off_its_segment_is_refused(tmp_path, record):
    run = TestRun.start(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"goes on with step 1 at 0\.\.4: samples would be"):
        run.recorder.step(record)


def test_an_evaluation_off_its_cursor_is_refused(tmp_path):
    run = TestRun.start(tmp_path / "run")
    record = EvaluationRecord("valid", 0, 4, 4, "0" * 16, 1.0)
    with pytest.raises(RunDirectoryError, match="began at position 4, but its stream goes on at 0"):
        run.recorder.evaluation(record)


def test_a_checkpoints_ledger_covers_every_line(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 2)
    run.evaluate(2)
    run.steps(3, 5)
    ledger = read_ledger(run.save_checkpoint(evaluation_due=True))
    lines = list(read_lines(run.lines_path))
    digests = [digest_value(record.digest) for record in read_attempt(run.lines_path)]
    [span] = ledger.spans
    assert (span.attempt, span.first_step, span.last_step) == (1, 1, 5)
    assert span.chain == lines[-1].chain
    assert span.digest_sum == digest_text(sum(digests))
    assert span.geometry == BatchGeometry(4, 1, 1)
    assert (ledger.step, ledger.evaluation_due) == (5, True)
    assert ledger.streams["train"].next_position == 20
    assert ledger.streams["valid"].next_position == 4
    assert ledger.streams["valid"].cursors == {"valid-component": 4}


def test_a_ledger_of_unwritten_lines_is_refused(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.recorder.step(step_record(1))
    with pytest.raises(RunDirectoryError, match="1 lines up to step 1 are not written yet"):
        run.recorder.ledger(lambda stream, position: {}, evaluation_due=False)


def test_evaluations_after_the_loop_do_not_move_the_cursor(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 2)
    run.evaluate(2)
    run.evaluate(2, at_end=True)
    assert run.recorder.next_position("valid") == 4
    assert read_ledger(run.save_checkpoint()).streams["valid"].next_position == 4


def test_a_second_attempt_continues_the_chain_and_the_spans(tmp_path):
    first = TestRun.start(tmp_path / "run")
    first.steps(1, 3)
    ledger = read_ledger(first.save_checkpoint())
    second = TestRun.start(tmp_path / "run", ledger)
    second.steps(4, 6)
    spans = read_ledger(second.save_checkpoint()).spans
    assert spans[0] == ledger.spans[0]
    assert [(span.attempt, span.first_step, span.last_step) for span in spans] == [
        (1, 1, 3),
        (2, 4, 6),
    ]


def test_cursors_of_datasets_that_no_order_draws_from_are_kept(tmp_path):
    begin = small_ledger()
    train = replace(begin.streams["train"], cursors={"removed": 17, "train-component": 3})
    run = TestRun.start(tmp_path / "run", replace(begin, streams={**begin.streams, "train": train}))
    run.steps(1, 2)
    ledger = read_ledger(run.save_checkpoint())
    assert ledger.streams["train"].cursors == {"removed": 17, "train-component": 8}


def test_an_evaluation_alone_makes_a_span_without_steps(tmp_path):
    first = TestRun.start(tmp_path / "run")
    first.steps(1, 2)
    second = TestRun.start(
        tmp_path / "run", read_ledger(first.save_checkpoint(evaluation_due=True))
    )
    second.evaluate(2)
    span = read_ledger(second.save_checkpoint()).spans[-1]
    assert (span.attempt, span.first_step, span.last_step) == (2, 3, 2)
    assert span.digest_sum == "0" * 16


def test_facts_tell_how_an_attempt_began_and_ended(tmp_path):
    instruction = Instruction(kind="start")
    loaded = LoadedCheckpoint(path="/a/global_step0", run_id=None, step=0, chain=None)
    run = TestRun.start(
        tmp_path / "run",
        instruction=instruction,
        obeyed=True,
        loaded=loaded,
        environment={"host": "h"},
    )
    facts = read_attempt_facts(tmp_path / "run", 1)
    assert facts.stop is None
    assert facts.begin.instructions == (
        ObeyedInstruction(instruction=instruction, run_id=run.begin.run_id, attempt=1, step=0),
    )
    run.steps(1, 4)
    ledger = read_ledger(run.save_checkpoint())
    assert ledger.instructions == facts.begin.instructions
    run.recorder.close("finished")
    [facts] = read_all_attempt_facts(tmp_path / "run")
    assert (facts.number, facts.loaded, facts.environment) == (1, loaded, {"host": "h"})
    assert facts.committed == (CommittedCheckpoint(step=4, chain=ledger.chain),)
    assert facts.stop == Stop(reason="finished", time=2e9, step=4, chain=ledger.chain, done_step=4)
    assert [is_finished(facts, train_iters) for train_iters in (4, 5)] == [True, False]
    [instructed] = instructed_attempts([facts])
    assert (instructed.obeyed, instructed.committed_steps) == (True, [4])


def test_start_up_times_are_on_record_and_may_be_missing(tmp_path):
    save = tmp_path / "run"
    run = TestRun.start(save)
    assert read_attempt_facts(save, 1).startup_s == {}
    run.recorder.started({"imports": 5.25, "connect": 0.5})
    run.steps(1, 4)
    run.save_checkpoint()
    facts = read_attempt_facts(save, 1)
    assert facts.startup_s == {"imports": 5.25, "connect": 0.5}
    assert [one.step for one in facts.committed] == [4]
    path = attempt_facts_path(save, 1)
    values = json.loads(path.read_text())
    del values["startup_s"]  # as earlier releases wrote it
    path.write_text(json.dumps(values))
    assert read_attempt_facts(save, 1) == replace(facts, startup_s={})


def test_a_launch_goes_on_if_its_start_up_times_cannot_be_written(tmp_path, monkeypatch):
    run = TestRun.start(tmp_path / "run")

    def full_disk(save, facts):
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr("megatron.ledger.recorder.write_attempt_facts", full_disk)
        run.recorder.started({"imports": 5.25})
    assert "not on record: no space" in run.warnings[0]
    run.steps(1, 4)
    run.recorder.close("finished")
    assert read_attempt_facts(tmp_path / "run", 1).stop is not None


def test_a_run_that_was_stopped_is_not_finished(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 4)
    assert not is_finished(read_attempt_facts(tmp_path / "run", 1), 4)
    run.recorder.close("exit_interval")
    assert not is_finished(read_attempt_facts(tmp_path / "run", 1), 4)


def test_steps_without_digests_stay_unrecorded_when_an_attempt_ends(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 2)
    run.recorder.step(step_record(3))
    run.recorder.close("error")
    assert steps_in(run) == [1, 2]
    assert read_attempt_facts(tmp_path / "run", 1).stop.step == 2


def test_damaged_facts_are_an_error(tmp_path):
    run = TestRun.start(tmp_path / "run")
    path = run.save / "attempts" / "0001.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(RunDirectoryError, match=r"0001\.json does not describe an attempt"):
        read_attempt_facts(run.save, 1)
    path.write_text(text.replace('"format": 1', '"format": 9', 1))
    with pytest.raises(RunDirectoryError, match="format 9 is not known"):
        read_attempt_facts(run.save, 1)
    path.write_text("")  # killed between claiming the number and writing
    assert read_attempt_facts(run.save, 1) is None
