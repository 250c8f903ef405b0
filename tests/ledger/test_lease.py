"""One job at a time writes to a save directory, whatever happens to the one before.

Killed, paused and dead processes are real ones; a machine elsewhere is a lock with another host.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import time

import pytest

from megatron.base import write_points
from megatron.base.errors import RunDirectoryError
from megatron.ledger.lease import Lease
from tests.ledger.recorded_runs import memory_directory

fork = multiprocessing.get_context("fork")


@pytest.fixture
def save():
    with memory_directory() as directory:
        yield directory


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self, while_asleep=lambda: None):
        self.time = 1000.0
        self.while_asleep = while_asleep

    def __call__(self):
        return self.time

    def sleep(self, seconds):
        self.time += seconds
        self.while_asleep()


def acquire(save, *, clock=None, **options):
    """Take the lease by a clock that costs no time."""
    clock = clock or Clock()
    options = {"tell": lambda _: None, "environ": {}, **options}
    return Lease.acquire(save, clock=clock, sleep=clock.sleep, **options)


def edit(save, **changes):
    """Rewrite what ``lock.json`` says of its holder."""
    values = json.loads((save / "lock.json").read_text())
    for name, value in changes.items():
        if name in values["process"]:
            values["process"][name] = value
        else:
            values[name] = value
    (save / "lock.json").write_text(json.dumps(values) + "\n")


def start(action, *arguments):
    process = fork.Process(target=action, args=arguments)
    process.start()
    return process


def hold(save, acquired, interval_s=0.02):
    with Lease.acquire(save) as lease:
        lease.start_heartbeat(interval_s)
        acquired.set()
        time.sleep(60)


@pytest.fixture
def other_job(save):
    """A live process that holds ``save``."""
    acquired = fork.Event()
    process = start(hold, save, acquired)
    assert acquired.wait(20)
    yield process
    process.kill()
    process.join()


def pause(process):
    os.kill(process.pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])


def leave_dead_lock(save):
    """Let a process take the lease and die of SIGKILL."""

    def die():
        Lease.acquire(save)
        os.kill(os.getpid(), signal.SIGKILL)

    process = start(die)
    process.join()
    assert (save / "lock.json").exists()


def test_a_second_job_is_refused_at_once_and_told_who_holds_it(save, other_job):
    clock = Clock()
    with pytest.raises(RunDirectoryError, match=rf"use by process {other_job.pid} on .* 5 minutes"):
        acquire(save, clock=clock, now=lambda: time.time() + 300)
    assert clock.time == 1000.0


def test_a_killed_jobs_lease_is_taken_over_at_once_and_nothing_is_left(save, other_job):
    other_job.kill()
    other_job.join()
    clock = Clock()
    with acquire(save, clock=clock):
        assert clock.time == 1000.0
    assert list(save.iterdir()) == []


def test_a_zombie_holds_nothing(save, other_job):
    other_job.kill()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # killed but not joined: a zombie of this process
        with contextlib.suppress(RunDirectoryError):
            acquire(save).release()
            return
        time.sleep(0.01)
    pytest.fail("the zombie kept the lease")


def test_a_reused_pid_holds_nothing(save):
    acquire(save)
    edit(save, start=json.loads((save / "lock.json").read_text())["process"]["start"] + 1)
    clock = Clock()
    acquire(save, clock=clock).release()
    assert clock.time == 1000.0


@pytest.mark.parametrize(
    "elsewhere",
    [{"host": "node-17"}, {"boot": "another kernel"}, {"pid_namespace": "pid:[1]"}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_holder_elsewhere_is_given_90_seconds_by_the_observers_clock(save, elsewhere):
    acquire(save)
    edit(save, pid=2**22 + 1, **elsewhere)  # no such process here: that says nothing
    told = []
    clock = Clock()
    lease = acquire(save, clock=clock, tell=told.append)
    assert 1090 <= clock.time < 1092
    assert len(told) == 1
    assert f"{save} is held by process {2**22 + 1} on" in told[0]
    assert "waiting up to 90 s for a sign of life" in told[0]
    lease.require_held()


def test_a_heartbeat_from_elsewhere_refuses_and_ends_the_waiting(save):
    acquire(save)
    edit(save, host="node-17")
    clock = Clock()
    path = save / "lock.json"

    def beat():
        if clock.time > 1040:
            path.write_text(path.read_text().replace("0000", "0001", 1))

    clock.while_asleep = beat
    with pytest.raises(RunDirectoryError, match="on node-17, for 0 minutes: two jobs must not"):
        acquire(save, clock=clock)
    assert 1040 < clock.time < 1043


def test_a_lease_released_while_it_is_waited_for_is_taken(save):
    lease = acquire(save)
    edit(save, host="node-17")
    clock = Clock()
    clock.while_asleep = lambda: lease.release() if clock.time > 1010 else None
    with acquire(save, clock=clock):
        assert 1010 < clock.time < 1013


def test_the_holders_heartbeat_shows_in_its_lock(save, other_job):
    seen = set()
    deadline = time.monotonic() + 10
    while len(seen) < 3 and time.monotonic() < deadline:
        values = json.loads((save / "lock.json").read_text())
        assert values["process"]["pid"] == other_job.pid
        seen.add(int(values["heartbeat"]))
        time.sleep(0.005)
    assert len(seen) == 3


def test_a_paused_holder_is_taken_over_and_harms_nothing_when_it_wakes(save):
    held, outcome = fork.Event(), fork.Queue()

    def live():
        lease = Lease.acquire(save)
        lease.start_heartbeat(0.02)
        held.set()
        while not lease.is_lost:
            time.sleep(0.01)
        outcome.put(lease.still_held())
        with contextlib.suppress(RunDirectoryError):
            lease.require_held()
            outcome.put("held")
        lease.release()
        outcome.put("released")

    process = start(live)
    assert held.wait(20)
    time.sleep(0.1)
    pause(process)
    began = time.monotonic()
    with Lease.acquire(save, timeout_s=0.5, tell=lambda _: None) as lease:
        assert time.monotonic() - began >= 0.5
        text = lease.path.read_text()
        os.kill(process.pid, signal.SIGCONT)
        assert [outcome.get(timeout=20) for _ in range(2)] == [False, "released"]
        process.join()
        assert lease.path.read_text() == text
        lease.require_held()
    assert list(save.iterdir()) == []


def test_a_paused_holder_that_wakes_in_time_keeps_its_lease(save, other_job):
    pause(other_job)
    clock = Clock()

    def wake():
        if clock.time > 1050:
            os.kill(other_job.pid, signal.SIGCONT)
            time.sleep(0.1)

    clock.while_asleep = wake
    with pytest.raises(RunDirectoryError, match=f"in use by process {other_job.pid}"):
        acquire(save, clock=clock)


@pytest.mark.parametrize("is_here", [True, False])
def test_of_many_takers_one_gets_the_lease(save, is_here):
    for _ in range(5):
        leave_dead_lock(save)
        if not is_here:
            edit(save, host="node-17")
        results, everyone_tried = fork.Queue(), fork.Event()

        def take(results=results, everyone_tried=everyone_tried):
            try:
                lease = Lease.acquire(save, timeout_s=0.1, tell=lambda _: None)
                everyone_tried.wait(20)
                results.put("held" if lease.still_held() else "lost")
            except RunDirectoryError:
                results.put("refused")

        takers = [start(take) for _ in range(8)]
        outcomes = [results.get(timeout=20) for _ in range(7)]
        everyone_tried.set()
        outcomes.append(results.get(timeout=20))
        for taker in takers:
            taker.join()
        assert sorted(outcomes) == ["held"] + ["refused"] * 7


TAKING = [
    "lease: prepared",
    "lease: former holder's home moved",
    "lease: lock replaced",
    "lease: taken",
]


def signal_at(point, number):
    def hook(name):
        if name == point:
            write_points.install(None)
            os.kill(os.getpid(), number)

    write_points.install(hook)


def take_with_signal(save, point, number, outcome=None):
    signal_at(point, number)
    try:
        lease = Lease.acquire(save, timeout_s=0.1, tell=lambda _: None)
        outcome.put("held")
        lease.release()
    except RunDirectoryError:
        outcome.put("refused")


def test_the_points_of_taking_over_are_these(save):
    leave_dead_lock(save)
    points = []
    write_points.install(points.append)
    acquire(save).release()
    write_points.install(None)
    assert points == TAKING


@pytest.mark.parametrize("point", TAKING)
def test_a_taker_killed_at_any_point_is_in_nobodys_way(save, point):
    leave_dead_lock(save)
    process = start(take_with_signal, save, point, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    clock = Clock()
    with acquire(save, clock=clock) as lease:
        assert clock.time < 1001
        lease.require_held()
        assert {path.name for path in save.iterdir()} == {
            "lock.json",
            f".lease-{lease.holder.token}",
        }
    assert list(save.iterdir()) == []


@pytest.mark.parametrize("point", TAKING)
@pytest.mark.parametrize("is_free", [False, True])
def test_a_taker_paused_at_any_point_doesnt_push_its_successor_out(save, point, is_free):
    if not is_free:
        leave_dead_lock(save)
    elif point == TAKING[1]:
        return  # nobody's home is moved
    outcome = fork.Queue()
    process = start(take_with_signal, save, point, signal.SIGSTOP, outcome)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    with Lease.acquire(save, timeout_s=0.1, tell=lambda _: None) as lease:
        os.kill(process.pid, signal.SIGCONT)
        # At the last point it has looked already: it believes in a lease until it looks again.
        assert outcome.get(timeout=20) == ("held" if point == TAKING[-1] else "refused")
        process.join()
        lease.require_held()
    assert list(save.iterdir()) == []


def test_a_paused_taker_doesnt_push_out_who_has_just_taken_the_lease(save):
    leave_dead_lock(save)
    outcomes = fork.Queue(), fork.Queue()
    slow = start(take_with_signal, save, TAKING[1], signal.SIGSTOP, outcomes[0])
    assert os.WIFSTOPPED(os.waitpid(slow.pid, os.WUNTRACED)[1])
    fast = start(take_with_signal, save, TAKING[-1], signal.SIGSTOP, outcomes[1])
    assert os.WIFSTOPPED(os.waitpid(fast.pid, os.WUNTRACED)[1])
    holder = (save / "lock.json").read_text()
    os.kill(slow.pid, signal.SIGCONT)
    time.sleep(0.05)  # less than the lease of the paused holder lasts
    assert (save / "lock.json").read_text() == holder
    os.kill(fast.pid, signal.SIGCONT)
    assert outcomes[1].get(timeout=20) == "held"
    outcomes[0].get(timeout=20)
    for process in (slow, fast):
        process.join()
    assert list(save.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": "../../x"}', "\xff"])
def test_an_unreadable_lock_that_nobody_changes_is_taken_over_in_the_end(save, content):
    (save / "lock.json").write_text(content)
    told = []
    clock = Clock()
    with acquire(save, clock=clock, tell=told.append):
        assert clock.time >= 1090
    assert "held by an unreadable lock; waiting" in told[0]
    assert list(save.iterdir()) == []


def test_an_unreadable_lock_that_changes_is_somebodys(save):
    (save / "lock.json").write_text("a")
    clock = Clock(lambda: (save / "lock.json").write_text("b"))
    with pytest.raises(RunDirectoryError, match=r"lock\.json is not readable as a lock, and was"):
        acquire(save, clock=clock)


def test_a_token_that_is_a_path_leads_nowhere(save):
    (save / "precious").mkdir()
    lease = acquire(save / "run")
    edit(save / "run", token="../precious", host="node-17")
    acquire(save / "run").release()
    lease.release()
    assert (save / "precious").is_dir()


def test_a_lost_lease_is_not_released(save):
    lease = acquire(save)
    edit(save, host="node-17")
    other = acquire(save)
    with pytest.raises(RunDirectoryError, match=r"no longer this job's: process \d+ on .* over"):
        lease.require_held()
    lease.release()
    lease.release()
    other.require_held()


def test_a_lock_that_was_removed_is_lost(save):
    lease = acquire(save)
    (save / "lock.json").unlink()
    with pytest.raises(RunDirectoryError, match="its lock is gone"):
        lease.require_held()
    lease.release()
    assert list(save.iterdir()) == []


def test_a_save_that_cannot_be_made_is_refused(save):
    (save / "file").touch()
    with pytest.raises(RunDirectoryError, match=r"lock\.json cannot be read or written"):
        acquire(save / "file" / "run")


def test_a_lock_that_may_not_be_read_is_refused_and_not_waited_for(save):
    (save / "lock.json").mkdir()  # root may read every file
    with pytest.raises(RunDirectoryError, match=r"whether another job saves there: .*lock\.json"):
        acquire(save, clock=Clock())
    assert [entry.name for entry in save.iterdir()] == ["lock.json"]


def test_a_lock_that_cannot_be_read_for_a_moment_is_not_lost(save):
    lease = acquire(save)
    lock, aside = save / "lock.json", save / "aside"
    lock.rename(aside)
    lock.mkdir()
    lease.start_heartbeat(0.01)
    time.sleep(0.1)
    assert not lease.is_lost
    with pytest.raises(OSError, match=r"lock\.json"):
        lease.require_held()
    lock.rmdir()
    aside.rename(lock)
    lease.require_held()
    lease.release()
    assert list(save.iterdir()) == []


JOB = {"SLURM_JOB_ID": "71", "SLURM_RESTART_COUNT": "1", "SLURM_CLUSTER_NAME": "big"}
OTHER_JOB = {**JOB, "SLURM_JOB_ID": "99"}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands that answer like SLURM's: name -> (exit status, output)."""

    def answer(**commands):
        for name, (status, output) in commands.items():
            script = tmp_path / name
            script.write_text(
                f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{output}\nexit {status}\n'
            )
            script.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return answer


def waited_for_slurm_job(save, environ, holder=JOB):
    """Return whether the lease of ``holder``, on another node, is taken only after the wait."""
    acquire(save, environ=holder)
    edit(save, host="node-17")
    clock = Clock()
    acquire(save, clock=clock, environ=environ).release()
    return clock.time >= 1090


def test_a_requeued_job_takes_over_from_its_former_self_at_once(save):
    assert not waited_for_slurm_job(save, {**JOB, "SLURM_RESTART_COUNT": "2"})


def test_the_same_start_of_a_job_has_to_wait(save):
    assert waited_for_slurm_job(save, JOB)


@pytest.mark.parametrize(
    ("line", "is_over"),
    [
        ("JobId=71 JobState=CANCELLED Restarts=1", True),
        ("JobId=71 JobState=NODE_FAIL Reason=x Restarts=1", True),
        ("JobId=71 JobState=RUNNING Restarts=1", False),
        ("JobId=71 JobState=COMPLETING Restarts=1", False),
        ("JobId=71 JobState=SUSPENDED Restarts=1", False),
        ("JobId=71 JobState=PENDING Restarts=2", True),
        ("JobId=71 JobState=RUNNING Restarts=2", True),
        ("", False),
    ],
)
def test_the_controller_says_whether_a_job_is_over(save, slurm, line, is_over):
    slurm(scontrol=(0, f"echo '{line}'"), sacct=(0, "echo FAILED"))
    assert waited_for_slurm_job(save, OTHER_JOB) is not is_over


@pytest.mark.parametrize(
    ("output", "is_over"),
    [
        ("echo COMPLETED", True),
        ("echo 'CANCELLED by 1000'", True),
        ("echo RUNNING", False),
        ("echo COMPLETED; echo RUNNING", False),
        ("", False),
        ("exit 1", False),
    ],
)
def test_the_accounting_is_asked_about_a_job_the_controller_has_forgotten(
    save, slurm, output, is_over
):
    slurm(scontrol=(1, "echo 'slurm_load_jobs error: Invalid job id specified' >&2"))
    slurm(sacct=(0, output))
    assert waited_for_slurm_job(save, OTHER_JOB) is not is_over


@pytest.mark.parametrize("environ", [{}, {**OTHER_JOB, "SLURM_CLUSTER_NAME": "small"}])
def test_slurm_is_not_asked_about_jobs_of_another_cluster(save, slurm, tmp_path, environ):
    slurm(scontrol=(0, "echo JobId=71 JobState=FAILED"))
    assert waited_for_slurm_job(save, environ)
    assert not (tmp_path / "asked").exists()


def test_a_slurm_that_doesnt_answer_is_not_waited_for(save, slurm, monkeypatch):
    monkeypatch.setattr("megatron.ledger.slurm_jobs._TIMEOUT_S", 0.2)
    slurm(scontrol=(0, "exec sleep 30"), sacct=(0, "exec sleep 30"))
    began = time.monotonic()
    assert waited_for_slurm_job(save, OTHER_JOB)
    assert time.monotonic() - began < 10
