"""Steps done again: other samples are an error, other losses a warning where they must be equal."""

import pytest

from megatron.base.errors import RunDirectoryError
from megatron.ledger.attempts import read_attempt
from megatron.ledger.ledger_file import read_ledger
from tests.ledger.recorded_runs import TestRun, digest_of, with_batch_size


@pytest.fixture
def crashed(tmp_path):
    """Return a run killed at step 9 with checkpoints of steps 4 and 6."""
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 4)
    run.save_checkpoint(evaluation_due=True)
    run.evaluate(4)
    run.steps(5, 6)
    run.save_checkpoint()
    run.steps(7, 9)
    return run


def resume(run, step=6, **facts):
    return TestRun.start(run.save, read_ledger(run.save / f"global_step{step}"), **facts)


def other_digest(order_id, first, count):
    return digest_of(order_id, first + 1, count)


def test_equal_digests_and_losses_pass_in_silence(crashed):
    again = resume(crashed, 4)
    again.evaluate(4)
    again.steps(5, 12)
    assert again.warnings == []


def test_other_samples_are_an_error_and_stay_on_the_record(crashed):
    again = resume(crashed)
    message = r"step 8 was done by attempt 1 too, .* digest \w{16} then, \w{16} now"
    again.steps(7, 7)
    with pytest.raises(RunDirectoryError, match=message):
        again.steps(8, 8, digest=other_digest)
    assert [record.step for record in read_attempt(again.lines_path)] == [7, 8]


def test_another_loss_is_a_warning(crashed):
    again = resume(crashed)
    again.steps(7, 12, loss=lambda step: 2.5)
    assert len(again.warnings) == 3
    assert "step 7 was done by attempt 1 too, on the same samples" in again.warnings[0]
    assert f"its loss was {6.0 / 7!r} and is 2.5 now" in again.warnings[0]


def test_a_loss_that_was_and_is_no_number_is_the_same(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.save_checkpoint()
    run.steps(1, 2, loss=lambda step: float("nan"))
    again = resume(run, 0)
    again.steps(1, 2, loss=lambda step: float("nan"))
    assert again.warnings == []


def test_evaluations_done_again_are_compared_too(crashed):
    again = resume(crashed, 4)
    again.evaluate(4, loss=4.5)
    assert "the valid evaluation after step 4 was done by attempt 1 too" in again.warnings[0]


@pytest.mark.parametrize("facts", [{"numerics": "n2"}, {"restores_numbers": False}])
def test_losses_of_other_settings_are_not_compared(crashed, facts):
    again = resume(crashed, 4, **facts)
    again.evaluate(4, loss=5.0)
    again.steps(5, 9, loss=lambda step: 2.5)
    assert again.warnings == []


def test_an_evaluation_under_other_settings_is_not_compared(crashed):
    again = resume(crashed, 4, numerics="n2")
    again.evaluate(4, loss=4.5)
    assert again.warnings == []


def test_digests_are_compared_whatever_the_settings(crashed):
    again = resume(crashed, numerics="n2")
    with pytest.raises(RunDirectoryError, match="step 7 was done by attempt 1 too"):
        again.steps(7, 7, digest=other_digest)


def test_losses_are_not_compared_once_other_settings_are_in_the_weights(crashed):
    changed = resume(crashed, 4, numerics="n2")
    changed.evaluate(4)
    changed.steps(5, 6, loss=lambda step: 2.5)
    changed.save_checkpoint()
    back = resume(crashed, 6)  # the settings of attempt 1, on weights of attempt 2
    back.steps(7, 9, loss=lambda step: 3.5)
    assert back.warnings == []


def test_losses_are_compared_with_every_attempt_on_the_same_way(crashed):
    changed = resume(crashed, 6, numerics="n2")
    changed.steps(7, 8, loss=lambda step: 2.5)
    changed.save_checkpoint()
    changed.steps(9, 12, loss=lambda step: 2.5)
    again = resume(crashed, 8, numerics="n2")
    again.steps(9, 12, loss=lambda step: 3.5)
    assert [warning.partition(" was done by ")[0] for warning in again.warnings] == [
        f"step {step}" for step in range(9, 13)
    ]
    assert all("attempt 2" in warning for warning in again.warnings)


def test_a_lasting_reset_is_compared_with_what_came_after_it(crashed):
    reset = resume(crashed, 4, restores_numbers=False)
    reset.evaluate(4)
    reset.steps(5, 6, loss=lambda step: 2.5)
    reset.save_checkpoint()
    reset.steps(7, 9, loss=lambda step: 2.5)
    again = resume(crashed, 6)
    again.steps(7, 9, loss=lambda step: 3.5)
    assert len(again.warnings) == 3
    assert all("attempt 2" in warning for warning in again.warnings)


def test_steps_on_other_positions_are_not_compared(crashed):
    begin = with_batch_size(read_ledger(crashed.save / "global_step6"), 2)
    again = TestRun.start(crashed.save, begin)
    again.steps(7, 9, loss=lambda step: 2.5)
    assert again.warnings == []


def test_damaged_lines_of_another_attempt_do_not_stop_a_run(crashed):
    crashed.lines_path.write_bytes(b"no record\n" + crashed.lines_path.read_bytes()[9:])
    again = resume(crashed)
    again.steps(7, 9)
    (crashed.save / "attempts" / "0001.json").write_text("{")
    resume(crashed).steps(7, 9)
