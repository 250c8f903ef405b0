"""Two jobs never hold one save directory."""

import json
import multiprocessing
import time

import pytest

from megatron.base.errors import RunDirectoryError
from megatron.ledger.save_lock import SaveLock


def hold(save, acquired):
    SaveLock.acquire(save, now=time.time())
    acquired.set()
    time.sleep(60)


@pytest.fixture
def other_job(tmp_path):
    """A live process that holds the lock of ``tmp_path``."""
    fork = multiprocessing.get_context("fork")
    acquired = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path, acquired))
    process.start()
    assert acquired.wait(20)
    yield process
    process.kill()
    process.join()


def test_a_second_job_is_refused_and_told_who_holds_it(tmp_path, other_job):
    with pytest.raises(RunDirectoryError, match=rf"process {other_job.pid} on .* for 5 minutes"):
        SaveLock.acquire(tmp_path, now=time.time() + 300)


def test_the_lock_of_a_killed_job_on_this_machine_is_taken_over_at_once(tmp_path, other_job):
    other_job.kill()
    other_job.join()
    with SaveLock.acquire(tmp_path, now=time.time()):
        pass
    assert not (tmp_path / "lock.json").exists()


def test_a_zombie_does_not_hold_the_lock(tmp_path, other_job):
    other_job.kill()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # killed but not joined: a zombie of this process
        try:
            SaveLock.acquire(tmp_path, now=time.time()).release()
            return
        except RunDirectoryError:
            time.sleep(0.01)
    pytest.fail("the zombie kept the lock")


def test_a_reused_pid_does_not_hold_the_lock(tmp_path):
    lock = SaveLock.acquire(tmp_path, now=0.0)
    record = json.loads(lock.path.read_text())
    record["process_start"] += 1
    lock.path.write_text(json.dumps(record))
    SaveLock.acquire(tmp_path, now=0.0).release()


def test_a_lock_of_another_machine_is_never_judged_from_here(tmp_path):
    lock = SaveLock.acquire(tmp_path, now=0.0)
    record = json.loads(lock.path.read_text()) | {"host": "node-17", "pid": 2**22 + 1}
    lock.path.write_text(json.dumps(record))
    with pytest.raises(RunDirectoryError, match=r"on node-17.*remove .*lock\.json"):
        SaveLock.acquire(tmp_path, now=0.0)
    lock.release()
    assert lock.path.exists(), "a lock that is no longer ours must not be released by us"


def test_a_damaged_lock_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "lock.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="not readable as a lock"):
        SaveLock.acquire(tmp_path, now=0.0)


def test_many_takers_of_a_dead_lock_end_with_one_holder(tmp_path):
    fork = multiprocessing.get_context("fork")
    dead = fork.Process(target=SaveLock.acquire, args=(tmp_path,), kwargs={"now": 0.0})
    dead.start()
    dead.join()

    def take(results, everyone_tried):
        try:
            SaveLock.acquire(tmp_path, now=0.0)
            results.put("held")
        except RunDirectoryError:
            results.put("refused")
        everyone_tried.wait(20)

    results, everyone_tried = fork.Queue(), fork.Event()
    takers = [fork.Process(target=take, args=(results, everyone_tried)) for _ in range(8)]
    for taker in takers:
        taker.start()
    outcomes = sorted(results.get(timeout=20) for _ in takers)
    everyone_tried.set()
    for taker in takers:
        taker.join()
    assert outcomes == ["held"] + ["refused"] * 7
