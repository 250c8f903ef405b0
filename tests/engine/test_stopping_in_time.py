"""Time that runs out: a save is complete before, reckoned from what was measured."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.engine.time_limit import Deadline, SaveTimes, TimeLimit
from megatron.ledger import slurm_jobs
from megatron.ledger.slurm_jobs import end_of_job


class Clock:
    """Goes on when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def beats_until_stop(limit: TimeLimit, clock: Clock, step_s: float) -> int:
    beats = 0
    while limit() is None:
        beats += 1
        clock.now += step_s
    return beats


@given(st.floats(5, 60), st.floats(0.1, 600), st.floats(1500, 5000))
def test_two_more_steps_and_a_save_fit_and_little_time_is_wasted(step_s, save_s, span_s):
    clock = Clock()
    at = 1000.0 + span_s
    limit = TimeLimit(
        [Deadline(at, "limit")], began=1000.0, saves=lambda: SaveTimes(save_s, False), now=clock
    )
    beats_until_stop(limit, clock, step_s)
    done = clock.now + 2 * step_s + save_s
    assert done <= at or clock.now == 1000.0
    assert at - done <= 2 * step_s + 0.5 * save_s + 30 + 1e-6


def test_the_earlier_deadline_counts_and_the_message_says_what_was_reckoned():
    clock = Clock()
    limit = TimeLimit(
        [Deadline(9000.0, "SLURM"), Deadline(3000.0, "exit_duration_in_mins")],
        began=1000.0,
        saves=lambda: SaveTimes(10.0, False),
        now=clock,
    )
    beats_until_stop(limit, clock, 2.0)
    assert clock.now == 2950.0
    stop = limit()
    assert stop.reason == "time limit"
    assert stop.told == (
        "exit_duration_in_mins ends this launch in 50.0 s; reckoned with 3 steps of 2.00 s, "
        "a save of 15.0 s (as measured) and 30.0 s to spare"
    )


def test_the_first_step_which_may_compile_is_forgotten():
    clock = Clock()
    limit = TimeLimit(
        [Deadline(5000.0, "limit")], began=1000.0, saves=lambda: SaveTimes(0.0, False), now=clock
    )
    limit()
    clock.now += 500.0
    limit()
    beats_until_stop(limit, clock, 1.0)
    assert clock.now == pytest.approx(5000.0 - 33.0, abs=1.0)


def test_a_save_in_flight_is_waited_for_too_and_an_unknown_one_is_guessed():
    clock = Clock()
    told = {}
    for saves in (SaveTimes(10.0, True), SaveTimes(None, False)):
        clock.now = 1000.0
        limit = TimeLimit(
            [Deadline(3000.0, "limit")], began=1000.0, saves=lambda saves=saves: saves, now=clock
        )
        beats_until_stop(limit, clock, 1.0)
        told[saves] = limit().told
    assert "a save of 30.0 s (as measured)" in told[SaveTimes(10.0, True)]
    assert "a save of 120.0 s (guessed: none was measured)" in told[SaveTimes(None, False)]


def test_a_limit_that_was_extended_is_obeyed():
    clock = Clock()
    answers = iter([4000.0, 4000.0])
    limit = TimeLimit(
        [Deadline(3000.0, "limit", lambda: next(answers))],
        began=1000.0,
        saves=lambda: SaveTimes(0.0, False),
        now=clock,
    )
    beats_until_stop(limit, clock, 1.0)
    assert clock.now == 4000.0 - 32.0


def test_a_limit_that_was_lifted_ends_nothing():
    clock = Clock()
    limit = TimeLimit(
        [Deadline(3000.0, "limit", lambda: math.inf)],
        began=1000.0,
        saves=lambda: SaveTimes(0.0, False),
        now=clock,
    )
    for _ in range(10):
        clock.now += 1000.0
        assert limit() is None


@pytest.mark.parametrize(
    ("squeue", "environ", "end"),
    [
        ("1970-01-02T00:00:00", {"SLURM_JOB_END_TIME": "7"}, 86400.0),  # the limit was changed
        ("N/A", {"SLURM_JOB_END_TIME": "7"}, math.inf),  # it was lifted
        (None, {"SLURM_JOB_END_TIME": "1234"}, 1234.0),
        (None, {}, None),
        ("1970-01-02T00:00:00", {"SLURM_JOB_ID": ""}, None),
    ],
)
def test_slurm_says_when_a_job_ends(squeue, environ, end, monkeypatch, tmp_path):
    command = tmp_path / "squeue"
    if squeue is not None:
        command.write_text(f'#!/bin/sh\n[ "$*" = "-h -j 7 -o %e" ] && echo {squeue}\n')
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if squeue else str(tmp_path))
    monkeypatch.setenv("TZ", "UTC")
    assert end_of_job({"SLURM_JOB_ID": "7", **environ}) == end
    assert slurm_jobs._TIMEOUT_S <= 10
