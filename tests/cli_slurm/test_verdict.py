"""done, requeue or stop: every way a launch can end, against every past it can have."""

import signal
from pathlib import Path

import pytest

from megatron.base.exit_codes import CANNOT_LAUNCH, FAILED, FINISHED, HUNG, NODE_LOST, STOPPED
from megatron.cli.slurm.situation import Job, RunKeys, Situation
from megatron.cli.slurm.verdict import verdict
from megatron.ledger.launches_file import EndedLaunch, append_launch
from tests.ledger.queries.simulated_run import SimulatedRun, write_corpus

JOB = {"job": {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]"}}
TRAIN_ITERS = 20
NOW = 2e9


class Past:
    """A run whose launches end as told, each asked for its verdict; all of job 17."""

    def __init__(self, folder: Path) -> None:
        self.run = SimulatedRun(folder / "save", [write_corpus(folder / "corpus")])
        self.restarts = 0

    def attempt(self, until: int, *, stop: str | None, status: int, **how):
        """Train to a step, end so, decide."""
        environment = {"job": JOB["job"] | {"SLURM_RESTART_COUNT": str(self.restarts)}}
        self.run.launch(until, stop=stop, environment=environment, train_iters=TRAIN_ITERS, **how)
        return self.ended(status)

    def ended(self, status: int, *, job: Job | None = None, since: float | None = None):
        """Decide after a launch, and be requeued."""
        situation = self.situation(status, job=job, since=since)
        decision = verdict(situation)
        newest = situation.newest
        append_launch(
            self.run.save,
            EndedLaunch(
                time=NOW + self.restarts,
                job=situation.job.number,
                restarts=self.restarts,
                status=status,
                attempt=None if newest is None else newest.facts.number,
                has_begun=situation.own_attempt is not None,
                counts=decision.counts,
                action=decision.action,
                reason=decision.reason,
            ),
        )
        self.restarts += 1
        return decision

    def situation(self, status, *, job=None, since=None):
        return Situation.read(
            RunKeys(save=self.run.save, train_iters=TRAIN_ITERS, train_epochs=None),
            status=status,
            job=job or Job(number="17", restarts=self.restarts),
            since=since,
            now=NOW + self.restarts,
            tries=3,
        )


@pytest.fixture
def past(tmp_path):
    return Past(tmp_path)


@pytest.mark.parametrize("status", [FINISHED, FAILED, 134, STOPPED])
def test_finished_is_what_the_record_says_whatever_the_status(past, status):
    decision = past.attempt(TRAIN_ITERS, stop="finished", status=status, saves=[TRAIN_ITERS])
    assert (decision.action, decision.reason) == (
        "done",
        "the run is finished: step 20 is its last",
    )
    assert verdict(past.situation(None)).action == "done"


def test_status_0_without_that_record_is_not_finished(past):
    decision = past.attempt(6, stop=None, status=FINISHED, saves=[5])
    assert decision.action == "requeue"
    assert "its run unfinished after step 5 of 20" in decision.reason


def test_a_run_that_is_to_be_longer_now_is_not_finished(past):
    past.attempt(10, stop="finished", status=FINISHED, saves=[10])
    assert verdict(past.situation(None)).action == "requeue"


def test_exit_interval_is_done_and_says_that_the_run_is_not_finished(past):
    decision = past.attempt(10, stop="exit_interval", status=FINISHED, saves=[10])
    assert decision.action == "done"
    assert "step 10 of 20 because of exit_interval; the run is not finished" in decision.reason
    assert verdict(past.situation(None)).action == "requeue"  # the same command goes on


@pytest.mark.parametrize("status", [STOPPED, HUNG, NODE_LOST, 137, FAILED])
def test_an_attempt_that_trained_is_tried_again(past, status):
    assert past.attempt(7, stop=None, status=status, saves=[5]).action == "requeue"


def test_a_mistake_in_the_configuration_stops_at_once(past):
    past.attempt(7, stop=None, status=137, saves=[5])
    decision = past.ended(CANNOT_LAUNCH)
    assert decision.action == "stop"
    assert "exit status 2: configuration, data" in decision.reason


def test_a_job_that_fails_before_it_ever_trained_stops_at_once(past):
    decision = past.ended(FAILED)
    assert decision.action == "stop"
    assert "has never trained" in decision.reason


@pytest.mark.parametrize("status", [NODE_LOST, HUNG, 128 + signal.SIGKILL])
def test_a_machines_failure_before_the_first_step_is_tried_again(past, status):
    assert [past.ended(status).action for _ in range(3)] == ["requeue", "requeue", "stop"]


def test_a_job_that_slurm_starts_again_and_again_gives_up_before_a_launch(past):
    """Batch scripts that die with their node decide nothing; SLURM requeues their job."""
    for _ in range(3):
        environment = {"job": JOB["job"] | {"SLURM_RESTART_COUNT": str(past.restarts)}}
        past.run.launch(7, saves=[5], stop=None, environment=environment, train_iters=TRAIN_ITERS)
        past.restarts += 1
    assert verdict(past.situation(None)).action == "stop"
    assert verdict(past.situation(None, job=Job(number="18"))).action == "requeue"


def test_a_job_that_has_trained_may_fail_to_begin_twice(past):
    past.attempt(7, stop="signal SIGUSR1", status=STOPPED, saves=[7])
    decisions = [past.ended(FAILED) for _ in range(3)]
    assert [one.action for one in decisions] == ["requeue", "requeue", "stop"]
    assert decisions[-1].reason == "no progress: 3 launches ended before a first step"


def test_three_attempts_that_die_in_one_step_are_enough(past):
    how = {"stop": "failed: DatasetError", "status": FAILED}
    first = past.attempt(7, saves=[5], **how)
    second = past.attempt(7, **how)
    third = past.attempt(7, **how)
    assert [one.action for one in (first, second, third)] == ["requeue", "requeue", "stop"]
    assert third.reason == (
        "no progress: 3 attempts in a row recorded no step after 7 and saved nothing new"
    )
    assert [one.facts.number for one in third.stalled] == [1, 2, 3]
    # who submits again has looked at it: the count begins anew
    assert past.attempt(7, **how).action == "requeue"
    assert past.attempt(7, **how).action == "requeue"
    assert past.attempt(7, **how).action == "stop"


def test_progress_begins_the_count_anew(past):
    how = {"stop": "failed: RuntimeError", "status": FAILED}
    actions = [
        past.attempt(until, saves=[5] if past.restarts == 0 else [], **how).action
        for until in (7, 6, 6, 8, 7, 7, 7)
    ]
    # those after step 6 and 7 died elsewhere than the first, and the one after 8 came further
    assert actions == ["requeue"] * 6 + ["stop"]


def test_being_preempted_while_loading_goes_on_for_ever(past):
    past.attempt(7, stop="signal SIGTERM", status=STOPPED, saves=[7])
    for status in (STOPPED, 128 + signal.SIGTERM, STOPPED, 128 + signal.SIGUSR1, STOPPED):
        assert past.ended(status).action == "requeue"


def test_reaching_the_time_limit_while_loading_does_not(past):
    past.attempt(7, stop="signal SIGTERM", status=STOPPED, saves=[7])
    for expected in ("requeue", "requeue", "stop"):
        job = Job(number="17", restarts=past.restarts, end_time=NOW + past.restarts + 100)
        assert past.ended(STOPPED, job=job, since=NOW - 3500).action == expected


def test_preempted_attempts_without_a_step_do_not_count(past):
    past.attempt(7, stop="failed: RuntimeError", status=FAILED, saves=[5])
    for _ in range(4):
        assert past.attempt(5, stop=None, status=128 + signal.SIGTERM).action == "requeue"
    assert past.attempt(7, stop="failed: RuntimeError", status=FAILED).action == "requeue"


def test_a_new_submission_is_not_charged_with_what_came_before(past):
    how = {"stop": "failed: DatasetError", "status": FAILED}
    past.attempt(7, saves=[5], **how)
    past.attempt(7, **how)
    new = Job(number="18", submit_time=NOW + 100)
    assert verdict(past.situation(None, job=new)).action == "requeue"


def test_jobs_that_waited_when_the_run_was_stopped_do_not_try_again(past):
    how = {"stop": "failed: DatasetError", "status": FAILED}
    for until in (7, 7, 7):
        past.attempt(until, saves=[5] if past.restarts == 0 else [], **how)
    waiting = Job(number="18", submit_time=NOW - 100)
    decision = verdict(past.situation(None, job=waiting))
    assert decision.action == "stop"
    assert decision.reason.startswith("job 17, before this one, has stopped the run: no progress")
    later = Job(number="19", submit_time=NOW + 100)
    assert verdict(past.situation(None, job=later)).action == "requeue"


def test_jobs_of_a_chain_count_together(past):
    how = {"stop": "failed: DatasetError", "status": FAILED}
    past.attempt(7, saves=[5], **how)
    past.attempt(7, **how)
    past.run.launch(7, stop=how["stop"], environment={"job": {"SLURM_JOB_ID": "18"}})
    link = Job(number="18", submit_time=NOW - 100)
    assert past.ended(FAILED, job=link).action == "stop"


@pytest.mark.parametrize(("status", "action"), [(FINISHED, "done"), (FAILED, "stop"), (75, "stop")])
def test_without_save_nothing_can_go_on(status, action):
    situation = Situation.read(
        RunKeys(save=None, train_iters=5, train_epochs=None),
        status=status,
        job=Job(number=None),
        since=None,
        now=NOW,
        tries=3,
    )
    assert verdict(situation).action == action
