"""Lineages: which lines count, over crashes, roll-backs, branches and copied checkpoints."""

import json
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import RunDirectoryError
from megatron.ledger.ledger_file import LEDGER_FILE, Adoption, Parent, read_ledger
from megatron.ledger.lineage import (
    StepRange,
    abandoned_steps,
    lineage_of_checkpoint,
    lineage_of_run,
)
from megatron.ledger.lineage_check import check_abandoned, check_lineage
from tests.ledger.example_ledgers import small_ledger
from tests.ledger.recorded_runs import TestRun, memory_directory, with_batch_size


def attempts_of(lineage):
    return [(span.attempt, span.first_step, span.last_step) for span in lineage.ledger.spans]


def steps_of(lineage):
    return [record.step for record in lineage.steps()]


def abandoned(save, lineage):
    return [
        (one.facts.number, one.steps.first, one.steps.last)
        for one in abandoned_steps(save, lineage)
    ]


def resume(run, step):
    return TestRun.start(run.save, read_ledger(run.save / f"global_step{step}"))


def test_lines_after_a_checkpoint_are_abandoned_by_the_attempt_that_goes_on_from_it(tmp_path):
    first = TestRun.start(tmp_path / "run")
    first.steps(1, 4)
    first.save_checkpoint(evaluation_due=True)
    first.evaluate(4)
    first.steps(5, 7)
    second = resume(first, 4)
    second.evaluate(4)
    second.steps(5, 10)
    lineage = lineage_of_checkpoint(second.save_checkpoint())
    assert attempts_of(lineage) == [(1, 1, 4), (2, 5, 10)]
    assert steps_of(lineage) == list(range(1, 11))
    assert [record.after_step for record in lineage.evaluations()] == [4]
    assert lineage.unrecorded() == []
    assert abandoned(first.save, lineage) == [(1, 5, 7)]
    assert lineage.step(6) == next(record for record in lineage.steps(6, 6))
    assert lineage.span_of(6).attempt == 2
    assert lineage.step(11) is None


def test_a_roll_back_cuts_the_lineage(tmp_path):
    first = TestRun.start(tmp_path / "run")
    for step in (2, 4, 6):
        first.steps(step - 1, step)
        first.save_checkpoint()
    second = resume(first, 2)
    second.steps(3, 9)
    lineage = lineage_of_run(first.save)
    assert attempts_of(lineage) == [(1, 1, 2), (2, 3, 9)]
    assert abandoned(first.save, lineage) == [(1, 3, 6)]
    old = lineage_of_checkpoint(first.save / "global_step6")
    assert attempts_of(old) == [(1, 1, 6)]
    assert abandoned(first.save, old) == [(2, 3, 9)]


def test_a_running_attempt_is_read_up_to_its_last_line(tmp_path):
    run = TestRun.start(tmp_path / "run")
    assert lineage_of_run(run.save).ledger == run.begin
    run.steps(1, 4)
    run.evaluate(4)
    run.steps(5, 6)
    with run.lines_path.open("ab") as file:
        file.write(b'{"step": 7, "posit')  # being written
    lineage = lineage_of_run(run.save)
    assert steps_of(lineage) == [1, 2, 3, 4, 5, 6]
    assert (lineage.ledger.step, lineage.ledger.spans[0].digest_sum) == (6, "")
    positions = {name: state.next_position for name, state in lineage.ledger.streams.items()}
    assert positions == {"train": 24, "valid": 4}
    assert check_lineage(lineage).findings == ()


def test_a_copied_checkpoint_knows_its_lineage_without_the_lines(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 4)
    copy = shutil.copytree(run.save_checkpoint(), tmp_path / "copies" / "global_step4")
    lineage = lineage_of_checkpoint(copy)
    assert attempts_of(lineage) == [(1, 1, 4)]
    assert lineage.step(3) is None
    assert lineage.unrecorded() == [StepRange(1, 4)]
    assert check_lineage(lineage).num_steps == 0
    assert steps_of(lineage_of_checkpoint(copy, [run.save])) == [1, 2, 3, 4]


def test_another_runs_lines_are_not_taken_for_a_checkpoints(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 4)
    other = TestRun.start(tmp_path / "other", small_ledger(run_id="fedcba9876543210"))
    other.steps(1, 4)
    copy = shutil.copytree(run.save_checkpoint(), other.save / "global_step4")
    assert lineage_of_checkpoint(copy).unrecorded() == [StepRange(1, 4)]


def branch_of(run, step, save, run_id, *, is_continued=True):
    """Begin another run with a checkpoint of ``run``."""
    ledger = read_ledger(run.save / f"global_step{step}")
    parent = Parent(
        run_id=ledger.run_id,
        step=step,
        chain=ledger.chain,
        save=str(run.save),
        is_continued=is_continued,
        parent=ledger.parent,
    )
    begin = ledger if is_continued else small_ledger()
    return TestRun.start(save, replace(begin, run_id=run_id, parent=parent))


def test_a_branch_goes_on_with_its_parents_steps(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 4)
    run.save_checkpoint()
    run.steps(5, 6)
    branch = branch_of(run, 4, tmp_path / "branch", "b" * 32)
    branch.steps(5, 8)
    branch.save_checkpoint()
    twig = branch_of(branch, 8, tmp_path / "twig", "c" * 32)
    twig.steps(9, 9)
    lineage = lineage_of_checkpoint(twig.save_checkpoint())
    assert [(span.run_id[0], span.last_step) for span in lineage.ledger.spans] == [
        ("0", 4),
        ("b", 8),
        ("c", 9),
    ]
    assert steps_of(lineage) == list(range(1, 10))
    assert check_lineage(lineage).findings == ()
    assert abandoned(twig.save, lineage) == []
    shutil.rmtree(branch.save)
    assert steps_of(lineage_of_checkpoint(twig.save / "global_step9")) == [1, 2, 3, 4, 9]
    assert lineage.unrecorded() == [StepRange(5, 8)]


def test_a_finetuned_run_begins_a_lineage_of_its_own(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 4)
    run.save_checkpoint()
    tuned = branch_of(run, 4, tmp_path / "tuned", "b" * 32, is_continued=False)
    tuned.steps(1, 2)
    lineage = lineage_of_checkpoint(tuned.save_checkpoint())
    assert steps_of(lineage) == [1, 2]
    assert lineage.ledger.parent.step == 4
    assert check_lineage(lineage).findings == ()


def test_adopted_steps_are_not_unrecorded(tmp_path):
    ledger = small_ledger(
        step=10, adopted=Adoption(source="/neox/global_step10", step=10, assumed=())
    )
    run = TestRun.start(tmp_path / "run", ledger)
    run.steps(11, 12)
    lineage = lineage_of_checkpoint(run.save_checkpoint())
    assert lineage.adopted() == StepRange(1, 10)
    assert lineage.unrecorded() == []
    assert lineage.span_of(10) is None
    assert steps_of(lineage) == [11, 12]
    assert check_lineage(lineage).findings == ()


def test_a_checkpoint_without_a_ledger_has_no_lineage(tmp_path):
    assert lineage_of_checkpoint(tmp_path) is None
    assert lineage_of_run(tmp_path) is None


def test_steps_of_which_the_lines_are_gone_are_unrecorded(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 9)
    checkpoint = run.save_checkpoint()
    lines = run.lines_path.read_bytes().splitlines(keepends=True)
    run.lines_path.write_bytes(b"".join([*lines[:3], *lines[5:8]]))
    lineage = lineage_of_checkpoint(checkpoint)
    assert lineage.unrecorded() == [StepRange(4, 5), StepRange(9, 9)]
    run.lines_path.unlink()
    assert lineage.unrecorded() == [StepRange(1, 9)]


def test_attempts_of_a_release_without_a_ledger_are_left_alone(tmp_path):
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "0001.jsonl").write_text('{"step": 1}\n')
    run = TestRun.start(tmp_path)
    run.steps(1, 2)
    lineage = lineage_of_checkpoint(run.save_checkpoint())
    assert attempts_of(lineage) == [(2, 1, 2)]
    assert abandoned(tmp_path, lineage) == []
    assert check_abandoned(tmp_path, lineage) == ()


def test_a_damaged_line_is_an_error_to_who_asks_for_it(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 4)
    lineage = lineage_of_checkpoint(run.save_checkpoint())
    run.lines_path.write_bytes(run.lines_path.read_bytes().replace(b'"samples"', b'"sample"', 2))
    with pytest.raises(RunDirectoryError, match="not a record"):
        list(lineage.steps())
    assert lineage.step(3).step == 3


events = st.lists(
    st.one_of(
        st.tuples(st.just("steps"), st.integers(min_value=1, max_value=4)),
        st.tuples(st.just("save"), st.booleans()),
        st.tuples(st.just("evaluate"), st.booleans()),
        st.tuples(st.just("resume"), st.integers(min_value=0, max_value=5)),
        st.tuples(st.just("batch size"), st.integers(min_value=1, max_value=9)),
    ),
    max_size=14,
)


@given(events)
def test_every_history_leaves_a_lineage_that_an_obvious_account_agrees_with(events):
    with memory_directory() as save:
        check_history(save, events)


def check_history(save, events):
    """Compare with plain lists, for every checkpoint, of what each of its steps consumed."""
    run = TestRun.start(save)
    run.save_checkpoint()
    step, taken, evaluated = 0, [], []  # taken: (attempt, step, first position, samples)
    accounts = {0: (taken, evaluated)}
    for event, value in events:
        if event == "steps":
            run.steps(step + 1, step + value)
            for number in range(step + 1, step + value + 1):
                start = taken[-1][2] + taken[-1][3] if taken else 0
                size = run.begin.streams["train"].segments.segments[-1].batch_size
                taken = [*taken, (run.recorder.number, number, start, size)]
            step += value
        elif event == "evaluate":
            start = sum(4 for _, _, at_end in evaluated if not at_end)
            run.evaluate(step, at_end=value)
            evaluated = [*evaluated, (step, start, value)]
        elif event == "save":
            run.save_checkpoint()
            accounts[step] = (taken, evaluated)
        elif event == "resume":
            saved = sorted(accounts)
            step = saved[value % len(saved)]
            taken, evaluated = accounts[step]
            run = resume(run, step)
        else:
            run.save_checkpoint()
            accounts[step] = (taken, evaluated)
            begin = with_batch_size(read_ledger(save / f"global_step{step}"), value)
            run = TestRun.start(save, begin)
    lineages = [(lineage_of_run(save), (taken, evaluated))]
    for saved, account in accounts.items():
        lineages.append((lineage_of_checkpoint(save / f"global_step{saved}"), account))
    for lineage, (taken, evaluated) in lineages:
        assert [
            (lineage.span_of(one.step).attempt, one.step, one.position, one.samples)
            for one in lineage.steps()
        ] == taken
        assert [(one.after_step, one.position, one.at_end) for one in lineage.evaluations()] == (
            evaluated
        )
        assert lineage.unrecorded() == []
        check = check_lineage(lineage)
        assert check.findings == ()
        assert (check.num_steps, check.num_evaluations) == (len(taken), len(evaluated))
        assert check_abandoned(save, lineage) == ()


def test_a_ledger_is_readable_text_with_the_exactness_in_words(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 4)
    text = (run.save_checkpoint() / LEDGER_FILE).read_text()
    assert json.loads(text)["exactness"] == (
        "Steps 1..4 consumed every position of the training stream once."
    )
