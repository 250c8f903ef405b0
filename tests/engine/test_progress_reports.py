"""How long a rank may take, and what its progress file says of it."""

import math
import time

import pytest

from megatron.base.progress import Progress, ProgressFile, open_progress
from megatron.engine.progress_reports import HangLimits, Phases

LIMITS = HangLimits(least_step_s=2.0, times_slowest_step=10.0, first_s=1000.0, save_s=5000.0)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("megatron.base.progress.time.monotonic", clock)
    return clock


@pytest.fixture
def file():
    file = ProgressFile()
    yield file
    file.close()


@pytest.fixture
def watched(file, clock):
    """Return (phases, limit of what they are in)."""

    def make(limits: HangLimits):
        progress = Progress.at(file.path)

        def limit() -> float:
            snapshot = file.read()
            return snapshot.deadline - snapshot.started

        return Phases(progress, limits, clock=clock), limit

    return make


def take_steps(phases: Phases, clock: Clock, first: int, *seconds: float) -> None:
    for number, taken in enumerate(seconds):
        phases.step(first + number)
        clock.now += taken


def test_a_new_file_says_nothing_and_has_no_deadline(file):
    snapshot = file.read()
    assert (snapshot.phase, snapshot.step, snapshot.deadline) == ("", None, math.inf)
    assert not snapshot.tells_stacks


def test_another_process_reads_what_a_rank_writes(file, clock):
    Progress.at(file.path).enter("a name longer than sixteen", 7, 30.0)
    snapshot = file.read()
    assert (snapshot.phase, snapshot.step) == ("a name longer th", 7)
    assert (snapshot.started, snapshot.deadline) == (1000.0, 1030.0)


def test_a_process_without_a_file_or_with_a_bad_one_goes_on_unwatched(capsys):
    open_progress({}).enter("load")
    assert capsys.readouterr().err == ""
    open_progress({"NEOX_PROGRESS_FILE": "/proc/self/fd/999"}).step(1)
    assert "nobody would notice a hang of this rank: /proc/self/fd/999" in capsys.readouterr().err


def test_the_first_two_steps_may_take_long_and_the_others_as_long_as_steps_do(watched, clock):
    phases, limit = watched(LIMITS)
    limits = []
    for step, seconds in ((1, 600.0), (2, 3.0), (3, 0.01)):
        phases.step(step)
        limits.append(limit())
        clock.now += seconds
    assert limits == [1000.0, 1000.0, 30.0]


def test_quick_steps_have_the_least_limit(watched, clock):
    phases, limit = watched(LIMITS)
    take_steps(phases, clock, 1, 9.0, 0.01, 0.01, 0.01)
    assert limit() == 2.0


def test_a_slow_step_counts_for_at_least_fifty_steps_and_then_no_more(watched, clock):
    phases, limit = watched(LIMITS)
    take_steps(phases, clock, 1, 9.0, 1.0, 7.0, *[1.0] * 48)
    take_steps(phases, clock, 52, *[1.0] * 50)
    assert limit() == 70.0
    take_steps(phases, clock, 102, *[1.0] * 50)
    assert limit() == 10.0


def test_what_comes_between_steps_is_not_part_of_them(watched, clock):
    phases, limit = watched(LIMITS)
    take_steps(phases, clock, 1, 9.0, 1.0)
    phases.save()
    clock.now += 500.0
    phases.evaluation()
    clock.now += 500.0
    phases.step(3)
    assert limit() == 10.0


def test_a_save_may_take_long_however_quick_the_one_before_was(watched, clock):
    # It waits for the bytes of the one before, which were written behind the steps.
    phases, limit = watched(LIMITS)
    for step in (1, 2):
        phases.step(step)
        phases.save()
        assert limit() == 5000.0
        clock.now += 0.1
    phases.finish()
    assert limit() == 5000.0


def test_an_evaluation_is_watched_batch_by_batch(watched, clock, file):
    phases, limit = watched(LIMITS)
    take_steps(phases, clock, 1, 9.0, 1.0, 1.0)
    phases.evaluation()
    phases.batch()
    assert limit() == 1000.0  # the first one compiles
    phases.step(4)
    phases.evaluation()
    phases.batch()
    snapshot = file.read()
    assert (snapshot.phase, snapshot.step, limit()) == ("evaluation", 4, 10.0)


def test_hang_timeout_is_the_limit_of_steps_but_not_of_what_may_take_long(watched, clock):
    phases, limit = watched(HangLimits(hang_timeout=5.0))
    phases.step(1)
    assert limit() == 1800.0
    phases.step(2)
    assert limit() == 5.0
    phases.save()
    assert limit() >= 1800.0
    phases.enter("data")
    assert limit() >= 3600.0


def test_a_long_hang_timeout_is_the_least_limit_of_everything():
    limits = HangLimits(hang_timeout=1e6)
    assert limits.of_phase("connect") == limits.of_first == limits.of_save == 1e6


def test_hang_timeout_0_means_that_nothing_has_a_limit(watched):
    phases, limit = watched(HangLimits(hang_timeout=0))
    for begin in (
        lambda: phases.enter("load"),
        lambda: phases.step(1),
        lambda: phases.step(2),
        phases.save,
        phases.evaluation,
        phases.batch,
        phases.finish,
    ):
        begin()
        assert limit() == math.inf


def test_telling_of_a_step_costs_next_to_nothing(file):
    phases = Phases(Progress.at(file.path), HangLimits())
    started = time.perf_counter()
    for step in range(20_000):
        phases.step(step)
    assert (time.perf_counter() - started) / 20_000 < 10e-6  # about 1 us; the machine may be busy
