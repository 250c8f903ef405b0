"""The demo's verdict: exact means every bit of every step."""

import math
from dataclasses import replace

from rich.console import Console

from megatron.ledger.attempts import StepRecord
from tools.demo.comparison import (
    Passes,
    by_step,
    comparison_table,
    differences,
    evaluation_differences,
    weight_differences,
)

UNDISTURBED = [
    StepRecord(
        step=step,
        position=(step - 1) * 16,
        samples=16,
        loss=7.0 / step,
        lr=1e-3 / step,
        grad_norm=2.0 / step,
        skipped=False,
        seconds=0.25 * step,
    )
    for step in range(1, 61)
]


def passes(killed=UNDISTURBED[:27], resumed=UNDISTURBED[20:]):
    return Passes(by_step(UNDISTURBED), by_step(killed), by_step(resumed))


def problems_of(these):
    return differences(these, train_iters=60, saved_step=20)


def test_equal_passes_have_no_difference_whatever_the_clock_says():
    resumed = [replace(record, seconds=99.0) for record in UNDISTURBED[20:]]
    assert problems_of(passes(resumed=resumed)) == []


def test_one_bit_of_a_loss_is_a_difference():
    off = list(UNDISTURBED[20:])
    off[5] = replace(off[5], loss=math.nextafter(off[5].loss, 1.0))
    (problem,) = problems_of(passes(resumed=off))
    assert problem.startswith("step 26: loss is ")
    assert "in the resumed pass" in problem


def test_a_step_at_another_position_is_a_difference():
    off = [*UNDISTURBED[:26], replace(UNDISTURBED[26], position=0)]
    assert problems_of(passes(killed=off)) == [
        "step 27: position is 0 in the killed pass, 416 undisturbed"
    ]


def test_a_resume_that_began_at_another_step_is_a_difference():
    assert problems_of(passes(resumed=UNDISTURBED)) == [
        "the resumed pass recorded steps 1..60 (60), not 21..60 (40)"
    ]


def test_a_pass_without_records_is_a_difference():
    assert problems_of(passes(resumed=[])) == [
        "the resumed pass recorded steps none, not 21..60 (40)"
    ]


def rendered(these):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(comparison_table(these, saved_step=20))
    return capture.get()


def test_the_table_shows_where_it_was_saved_and_killed():
    table = rendered(passes())
    assert "equal, saved" in table
    assert "equal, killed after it" in table
    assert "DIFFERENT" not in table


def test_the_table_marks_a_difference():
    off = [replace(record, loss=record.loss + 1e-6) for record in UNDISTURBED[20:]]
    assert "DIFFERENT" in rendered(passes(resumed=off))


def test_one_byte_of_the_weights_is_a_difference(tmp_path):
    for name, content in (("a", b"weights"), ("b", b"weighty")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "layer_00-model_00-model_states.pt").write_bytes(content)
    assert weight_differences(tmp_path / "a", tmp_path / "a") == []
    (problem,) = weight_differences(tmp_path / "a", tmp_path / "b")
    assert "b/layer_00-model_00-model_states.pt is not the undisturbed one" in problem


def test_checkpoints_without_weights_are_a_difference(tmp_path):
    assert len(weight_differences(tmp_path, tmp_path)) == 1


EVALUATION = " validation results at iteration 60 | lm_loss value: 5.417031E+00 |\n"


def test_an_evaluation_with_another_loss_is_a_difference():
    log = f"samples/sec: 1\n{EVALUATION}"
    assert evaluation_differences(log, log) == []
    (problem,) = evaluation_differences(log, log.replace("5.417031", "5.417032"))
    assert "5.417032E+00" in problem


def test_a_resumed_pass_without_evaluations_is_a_difference():
    assert evaluation_differences(EVALUATION, "") == ["the resumed pass evaluated nothing"]
