"""A commit ends with the checkpoint before it, or with the new one: whole, whatever happens.

Kills and pauses are real: forked writers that send themselves SIGKILL or SIGSTOP at a write point.
"""

import multiprocessing
import os
import random
import shutil
import signal
import sys

import pytest

from megatron.base import write_points
from megatron.base.errors import CheckpointError, MegatronError, RunDirectoryError
from megatron.base.file_digests import FileDigest, digest_file
from megatron.ledger.attempt_facts import read_attempt_facts
from megatron.ledger.commit import (
    Entry,
    abandon,
    await_entries,
    begin,
    commit,
    is_committed,
    leave_entry,
    new_token,
    next_sequence,
)
from megatron.ledger.lease import Lease
from megatron.ledger.ledger_file import CheckpointPlace, read_ledger
from megatron.ledger.manifest import (
    StoredFile,
    digest_problems,
    quick_problems,
    read_manifest,
)
from megatron.ledger.run_directory import list_checkpoints, read_latest, remove_leftovers
from tests.ledger.example_ledgers import small_ledger
from tests.ledger.recorded_runs import TestRun, memory_directory
from tests.worlds import run_ranks

WORLD_SIZE = 3


@pytest.fixture
def tmp_path():  # instead of pytest's
    with memory_directory() as directory:
        yield directory


def write_part(temporary, rank, content):
    """Write a rank's two files, as the saver does: digested, synced."""
    files = {}
    for name in (f"layer_00-model_{rank:02d}-model_states.pt", f"mp_rank_{rank:02d}.pt"):
        data = random.Random(f"{content}{name}").randbytes(10_000 + rank)
        digest = FileDigest()
        digest.update(data)
        with open(temporary / name, "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        write_points.reach(f"save: {name} written")
        files[name] = StoredFile(digest.size, digest.hexdigest())
    return files


def save_checkpoint(save, step, content, *, lease=None, parent=None, token=None):
    """Save as all ranks of a world, one after the other."""
    temporary = begin(save, step, token or new_token())
    for rank in range(WORLD_SIZE):
        leave_entry(temporary, rank, write_part(temporary, rank, content))
    return commit(
        temporary,
        step,
        entries=await_entries(temporary, WORLD_SIZE),
        texts={"configs/run.yml": f"content: {content}\n"},
        ledger=small_ledger(step=step),
        attempt=1,
        parent=parent,
        lease=lease,
    )


def content_of(checkpoint):
    """Return which content a whole checkpoint has; fail if it isn't whole."""
    manifest = read_manifest(checkpoint)
    assert quick_problems(checkpoint, manifest) == []
    assert digest_problems(checkpoint, manifest, manifest.files) == []
    assert read_ledger(checkpoint).step == manifest.step
    return (checkpoint / "configs" / "run.yml").read_text().split()[1]


def hidden(save):
    return sorted(str(path.relative_to(save)) for path in save.rglob(".*"))


def in_child(action):
    """Run ``action`` in a forked process; return its exit code, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(30)
    assert process.exitcode is not None
    return process.exitcode


def points_of(action):
    """Return the write points ``action`` reaches, in order."""
    points = []
    write_points.install(points.append)
    try:
        action()
    finally:
        write_points.install(None)
    return points


def signal_at(index, number):
    """Send this process signal ``number`` at its ``index``-th write point."""
    count = 0

    def hook(_):
        nonlocal count
        count += 1
        if count == index + 1:
            os.kill(os.getpid(), number)

    write_points.install(hook)


@pytest.mark.distributed
def test_ranks_write_and_rank_0_commits(tmp_path):
    token = new_token()

    def work(context):
        temporary = begin(tmp_path, 7, token)
        leave_entry(temporary, context.rank, write_part(temporary, context.rank, "a"))
        if context.rank == 0:
            entries = await_entries(temporary, context.world_size)
            commit(
                temporary,
                7,
                entries=entries,
                texts={"configs/run.yml": "content: a\n"},
                ledger=small_ledger(step=7),
                attempt=4,
                parent=None,
                lease=None,
            )

    (tmp_path / "save").mkdir()
    run_ranks(work, 4, tmp_path)
    assert read_latest(tmp_path) == 7
    checkpoint = tmp_path / "global_step7"
    assert content_of(checkpoint) == "a"
    manifest = read_manifest(checkpoint)
    assert (manifest.sequence, manifest.step, manifest.attempt) == (1, 7, 4)
    assert len(manifest.files) == 4 * 2 + 2
    assert hidden(tmp_path) == []


def test_a_commit_opens_no_file_that_the_ranks_wrote(tmp_path):
    temporary = begin(tmp_path, 20, new_token())
    files = write_part(temporary, 0, "a")

    def work():
        opened = []
        sys.addaudithook(lambda event, what: opened.append(what[0]) if event == "open" else None)
        commit_with(temporary, {0: Entry(files)})
        assert any("manifest.json" in str(path) for path in opened)
        assert not [path for path in opened if str(path).endswith(".pt")]

    assert in_child(work) == 0
    assert read_latest(tmp_path) == 20


def test_sequence_and_parent_stand_in_manifest_and_ledger(tmp_path):
    save_checkpoint(tmp_path, 10, "a")
    manifest = save_checkpoint(tmp_path, 20, "b", parent=1)
    assert (manifest.sequence, manifest.parent) == (2, 1)
    place = CheckpointPlace(sequence=2, parent=1)
    assert read_ledger(tmp_path / "global_step20").checkpoint == place


def test_a_sequence_is_never_given_twice(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, "a")
    # On its way out, replaced, damaged: a number that was given stays given.
    (tmp_path / "global_step30").rename(tmp_path / ".deleted-global_step30-0123456789ab")
    assert next_sequence(tmp_path) == 4
    (tmp_path / ".deleted-global_step30-0123456789ab").rename(
        tmp_path / "global_step10" / ".replaced"
    )
    (tmp_path / "global_step20" / "manifest.json").write_text("{")
    assert next_sequence(tmp_path) == 4


def test_attempts_remember_sequences_of_checkpoints_that_are_gone(tmp_path):
    run = TestRun.start(tmp_path / "run")
    run.steps(1, 2)
    assert run.recorder.previous_sequence is None
    ledger = read_ledger(run.save_checkpoint())
    run.recorder.committed(ledger, 41)
    assert run.recorder.previous_sequence == 41
    TestRun.start(tmp_path / "run", ledger)
    assert read_attempt_facts(tmp_path / "run", 2).committed == ()
    assert next_sequence(tmp_path / "run") == 42
    (tmp_path / "run" / "attempts" / "0002.json").write_text("{")
    assert next_sequence(tmp_path / "run") == 42


@pytest.mark.parametrize("is_saved_again", [False, True], ids=["new step", "saved again"])
def test_a_kill_at_any_write_point_leaves_a_whole_checkpoint(tmp_path, is_saved_again):
    """And the next launch can start, clean up, and save."""
    step = 10 if is_saved_again else 20
    start = tmp_path / "start"
    start.mkdir()
    save_checkpoint(start, 10, "old")
    trial = tmp_path / "trial"
    shutil.copytree(start, trial)
    points = points_of(lambda: save_checkpoint(trial, step, "new"))
    assert content_of(trial / f"global_step{step}") == "new"
    assert hidden(trial) == []
    seen = set()
    for index in range(len(points)):
        save = tmp_path / f"killed-{index}"
        shutil.copytree(start, save)

        def die(save=save, index=index):
            signal_at(index, signal.SIGKILL)
            save_checkpoint(save, step, "new")

        assert in_child(die) == -signal.SIGKILL, points[index]
        remove_leftovers(save)
        assert hidden(save) == [], points[index]
        latest = read_latest(save)
        contents = {one: content_of(save / f"global_step{one}") for one in list_checkpoints(save)}
        if is_saved_again:
            assert (latest, list(contents)) == (10, [10]), points[index]
        else:
            assert contents[10] == "old", points[index]
        seen.add((latest, contents[latest]))
        manifest = save_checkpoint(save, 30, "after")
        assert manifest.sequence == (3 if contents.get(step) == "new" else 2)
        assert content_of(save / "global_step30") == "after"
    assert seen == {(10, "old"), (step, "new")}
    assert f"commit: {'latest replaced' if is_saved_again else 'manifest written'}" in points


def test_a_kill_while_cleaning_up_loses_nothing(tmp_path):
    start = tmp_path / "start"
    start.mkdir()
    save_checkpoint(start, 10, "old")
    points = points_of(lambda: save_checkpoint(start, 10, "old"))
    index = points.index("commit: old checkpoint set aside")

    def die(save=start, index=index):
        signal_at(index, signal.SIGKILL)
        save_checkpoint(save, 10, "new")

    assert in_child(die) == -signal.SIGKILL
    assert list_checkpoints(start) == []
    trial = tmp_path / "trial"
    shutil.copytree(start, trial)
    cleaning = points_of(lambda: remove_leftovers(trial))
    assert cleaning == ["undo: taken from its writer", "undo: old checkpoint named again"]
    for index in range(len(cleaning)):
        save = tmp_path / f"killed-{index}"
        shutil.copytree(start, save)

        def clean(save=save, index=index):
            signal_at(index, signal.SIGKILL)
            remove_leftovers(save)

        assert in_child(clean) == -signal.SIGKILL
        remove_leftovers(save)
        assert content_of(save / "global_step10") == "old"
        assert hidden(save) == []


class PausableLease(Lease):
    """Can be paused where it hurts most: after it looked, before what it then does."""

    def require_held(self):
        super().require_held()
        write_points.reach("lease: seen to be held")

    def still_held(self):
        answer = super().still_held()
        write_points.reach("lease: looked at, about to be released")
        return answer


@pytest.mark.parametrize("is_saved_again", [False, True], ids=["new step", "saved again"])
def test_a_writer_paused_at_any_point_damages_nothing_when_it_wakes(tmp_path, is_saved_again):
    """Paused longer than a lease lasts: another job has taken over, and has saved since."""
    step = 10 if is_saved_again else 20
    start = tmp_path / "start"
    start.mkdir()
    save_checkpoint(start, 10, "old")

    def write(save):
        with PausableLease.acquire(save, tell=lambda _: None) as lease:
            save_checkpoint(save, step, "loser", lease=lease)

    trial = tmp_path / "trial"
    shutil.copytree(start, trial)
    points = points_of(lambda: write(trial))
    for index, point in enumerate(points):
        save = tmp_path / f"paused-{index}"
        shutil.copytree(start, save)
        outcome = tmp_path / f"outcome-{index}"

        def pause(save=save, index=index, outcome=outcome):
            signal_at(index, signal.SIGSTOP)
            try:
                write(save)
                outcome.write_text("saved")
            except (MegatronError, OSError) as error:
                outcome.write_text(type(error).__name__)

        process = multiprocessing.get_context("fork").Process(target=pause)
        process.start()
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        with Lease.acquire(save, timeout_s=0.05, tell=lambda _: None) as lease:
            remove_leftovers(save)
            before = {one: content_of(save / f"global_step{one}") for one in list_checkpoints(save)}
            assert content_of(save / f"global_step{read_latest(save)}") in ("old", "loser"), point
            # The taker saves the very step that the loser is about to.
            save_checkpoint(save, step, "winner", lease=lease)
            files = snapshot(save)
            os.kill(process.pid, signal.SIGCONT)
            process.join(30)
            assert process.exitcode == 0
            assert snapshot(save) == files, point
            lease.require_held()
            assert read_latest(save) == step
            assert content_of(save / f"global_step{step}") == "winner"
            save_checkpoint(save, 30, "winner", lease=lease)
        assert hidden(save) == [], point
        assert before
        if "lease" not in point and "latest replaced" not in point and "deleted" not in point:
            assert outcome.read_text() != "saved", point


def snapshot(save):
    """Return every visible file's digest; a paused writer's own directory doesn't count."""
    return {
        str(path.relative_to(save)): digest_file(path)
        for path in save.rglob("*")
        if path.is_file() and not str(path.relative_to(save)).startswith(".")
    }


@pytest.mark.parametrize("when", ["before the name", "before latest"])
def test_the_loser_of_a_lease_publishes_nothing_more(tmp_path, when):
    save_checkpoint(tmp_path, 10, "old")
    lease = Lease.acquire(tmp_path)
    point = {"before the name": "commit: manifest written", "before latest": "latest prepared"}

    def hook(name):
        if name == point[when]:
            (tmp_path / "lock.json").unlink()

    write_points.install(hook)
    try:
        with pytest.raises(RunDirectoryError, match="no longer this job's: its lock is gone"):
            save_checkpoint(tmp_path, 20, "new", lease=lease)
    finally:
        write_points.install(None)
    lease.release()
    assert read_latest(tmp_path) == 10
    assert list_checkpoints(tmp_path) == ([10] if when == "before the name" else [10, 20])
    assert hidden(tmp_path) == []


def test_a_rank_with_a_problem_fails_the_commit_and_nothing_is_left(tmp_path):
    save_checkpoint(tmp_path, 10, "old")
    before = snapshot(tmp_path)
    temporary = begin(tmp_path, 20, new_token())
    leave_entry(temporary, 0, write_part(temporary, 0, "a"))
    leave_entry(temporary, 1, {}, "mp_rank_01.pt: No space left on device")
    with pytest.raises(CheckpointError, match=r"^rank 1: mp_rank_01\.pt: No space left"):
        commit_with(temporary, await_entries(temporary, 2))
    assert snapshot(tmp_path) == before
    assert hidden(tmp_path) == []


def commit_with(temporary, entries):
    return commit(
        temporary,
        20,
        entries=entries,
        texts={},
        ledger=None,
        attempt=None,
        parent=None,
        lease=None,
    )


def test_a_rank_on_a_full_disk_still_reports(tmp_path, monkeypatch):
    temporary = begin(tmp_path, 20, new_token())
    real_write = os.fsync

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        leave_entry(temporary, 0, {})
    monkeypatch.setattr(os, "fsync", real_write)
    with pytest.raises(CheckpointError, match="rank 0: could not even write down what failed"):
        commit_with(temporary, await_entries(temporary, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "mp_rank_00.pt is missing"),
        (lambda path: os.truncate(path, 5), "mp_rank_00.pt has 5 bytes instead of 10000"),
        (lambda path: (path.parent / "zero_pp_rank_9.pt").touch(), "zero_pp_rank_9.pt does not"),
    ],
)
def test_what_lies_there_must_be_what_the_ranks_wrote(tmp_path, damage, message):
    temporary = begin(tmp_path, 20, new_token())
    files = write_part(temporary, 0, "a")
    damage(temporary / "mp_rank_00.pt")
    with pytest.raises(CheckpointError, match=f"is not what lies there: {message}"):
        commit_with(temporary, {0: Entry(files)})
    assert os.listdir(tmp_path) == []


def test_two_ranks_never_write_one_file(tmp_path):
    temporary = begin(tmp_path, 20, new_token())
    files = write_part(temporary, 0, "a")
    with pytest.raises(CheckpointError, match=r"ranks 0 and 2 have both written layer_00"):
        commit_with(temporary, {0: Entry(files), 1: Entry(), 2: Entry(files)})


def test_waiting_for_ranks_ends_when_the_save_is_given_up(tmp_path):
    temporary = begin(tmp_path, 20, new_token())
    leave_entry(temporary, 0, {})
    with pytest.raises(CheckpointError, match=r"while 2 of 3 ranks were still writing, .* rank 1"):
        await_entries(temporary, 3, lambda: True)
    abandon(temporary)
    abandon(temporary)
    with pytest.raises(CheckpointError, match="can no longer be read"):
        await_entries(temporary, 3)


def test_the_final_save_is_skipped_only_if_latest_is_that_very_checkpoint(tmp_path):
    chain = small_ledger(step=20).chain
    assert not is_committed(tmp_path, 20, chain)
    save_checkpoint(tmp_path, 20, "a")
    assert is_committed(tmp_path, 20, chain)
    assert not is_committed(tmp_path, 20, "another lineage")
    os.truncate(tmp_path / "global_step20" / "mp_rank_00.pt", 7)
    assert not is_committed(tmp_path, 20, chain)
    save_checkpoint(tmp_path, 20, "a")
    save_checkpoint(tmp_path, 10, "b")  # a roll-back: latest is 10
    assert not is_committed(tmp_path, 20, chain)


def test_a_link_in_a_checkpoints_place_is_replaced_and_its_target_stays(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    save = tmp_path / "save"
    save.mkdir()
    (save / "global_step10").symlink_to(elsewhere)
    save_checkpoint(save, 10, "new")
    assert content_of(save / "global_step10") == "new"
    assert hidden(save) == []
    assert (elsewhere / "kept").exists()
