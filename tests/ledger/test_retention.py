"""Which checkpoints are deleted, and which never are, whatever keep_last_n says."""

import json
import multiprocessing
import os
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import CheckpointError
from megatron.base.file_digests import digest_file
from megatron.base.processes import ProcessIdentity
from megatron.base.write_points import install
from megatron.ledger.manifest import Manifest, StoredFile, write_manifest
from megatron.ledger.readers import is_being_read, reading
from megatron.ledger.retention import delete_expired, expired
from megatron.ledger.run_directory import list_checkpoints, remove_leftovers, write_latest

FILE = "mp_rank_00_model_states.pt"


def manifest(sequence: int, parent: int | None, step: int | None = None) -> Manifest:
    step = 10 * sequence if step is None else step
    return Manifest(sequence=sequence, step=step, run_id="r", attempt=1, parent=parent, files={})


def commit(save: Path, sequence: int, parent: int | None, step: int | None = None) -> Manifest:
    """Make a committed checkpoint, as far as names, sizes and manifest go."""
    place = manifest(sequence, parent, step)
    checkpoint = save / f"global_step{place.step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / FILE).write_text(f"sequence {sequence}")
    stored = StoredFile((checkpoint / FILE).stat().st_size, digest_file(checkpoint / FILE))
    written = Manifest(**{**vars(place), "files": {FILE: stored}})
    write_manifest(checkpoint, written)
    write_latest(save, place.step)
    return written


def line_of_checkpoints(save: Path, count: int) -> Manifest:
    """Make global_step10, 20, ... of one lineage; return the newest one's manifest."""
    return [commit(save, n, n - 1 or None) for n in range(1, count + 1)][-1]


@st.composite
def histories(draw):
    """Commits, each with an earlier one as parent (or none), and which of them are damaged."""
    count = draw(st.integers(1, 12))
    parents = [None, *(draw(st.none() | st.integers(1, n)) for n in range(1, count))]
    present = [manifest(n + 1, parent) for n, parent in enumerate(parents)]
    return present, draw(st.sets(st.integers(1, count - 1))) if count > 1 else set()


@given(histories(), st.integers(1, 4))
def test_the_newest_good_ones_and_everything_abandoned_stay(history, keep):
    present, damaged = history
    newest = present[-1]
    by_sequence = {one.sequence: one for one in present}
    ancestry = [newest.sequence]
    while by_sequence[ancestry[-1]].parent is not None:
        ancestry.append(by_sequence[ancestry[-1]].parent)
    gone = expired(
        newest, present, keep_last_n=keep, is_good=lambda one: one.sequence not in damaged
    )
    kept = [sequence for sequence in ancestry if by_sequence[sequence] not in gone]
    good = [sequence for sequence in ancestry if sequence not in damaged]
    assert {one.sequence for one in gone} <= set(ancestry)
    assert kept[0] == newest.sequence
    assert [sequence for sequence in kept if sequence not in damaged] == good[:keep]


def test_a_manifest_that_names_itself_or_a_later_one_as_parent_ends_the_lineage():
    for parent in (3, 4):
        present = [manifest(1, None), manifest(3, parent), manifest(4, 3)]
        assert expired(present[-1], present, keep_last_n=2, is_good=lambda one: True) == []


def test_deletion_touches_only_committed_checkpoints_directly_in_save(tmp_path):
    save = tmp_path / "has_global_step1_in_its_path"
    newest = line_of_checkpoints(save, 4)
    (save / "global_step5").mkdir()  # NeoX's: no manifest
    shutil.copytree(save / "global_step10", save / "global_step10_backup")
    shutil.copytree(save / "global_step10", save / "logs" / "global_step10")
    assert delete_expired(save, 2, newest) == [10, 20]
    assert list_checkpoints(save) == [5, 30, 40]
    assert (save / "global_step10_backup" / FILE).exists()
    assert (save / "logs" / "global_step10" / FILE).exists()
    assert not list(save.glob(".*"))


def test_what_a_roll_back_abandoned_stays_and_takes_no_place(tmp_path):
    line_of_checkpoints(tmp_path, 4)
    newest = commit(tmp_path, 5, 2, step=25)  # rolled back to 20
    assert delete_expired(tmp_path, 2, newest) == [10]
    assert list_checkpoints(tmp_path) == [20, 25, 30, 40]


def test_a_symbolic_link_is_kept(tmp_path):
    newest = line_of_checkpoints(tmp_path / "save", 3)
    (tmp_path / "save" / "global_step10").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", tmp_path / "save" / "global_step10")
    assert delete_expired(tmp_path / "save", 1, newest) == [20]
    assert (tmp_path / "save" / "global_step10" / FILE).exists()


def test_a_damaged_checkpoint_takes_no_good_one_s_place(tmp_path):
    newest = line_of_checkpoints(tmp_path, 5)
    (tmp_path / "global_step40" / FILE).write_text("torn")
    assert delete_expired(tmp_path, 2, newest) == [10, 20]
    assert list_checkpoints(tmp_path) == [30, 40, 50]


def test_a_checkpoint_whose_manifest_cannot_be_read_is_left_alone(tmp_path, caplog):
    newest = line_of_checkpoints(tmp_path, 4)
    (tmp_path / "global_step20" / "manifest.json").write_text("{")
    assert delete_expired(tmp_path, 1, newest) == [30]
    assert list_checkpoints(tmp_path) == [10, 20, 40]
    assert "leaves a damaged checkpoint alone" in caplog.text


def test_nothing_is_deleted_once_latest_is_another_s(tmp_path):
    newest = line_of_checkpoints(tmp_path, 3)
    commit(tmp_path, 4, 3)
    assert delete_expired(tmp_path, 1, newest) == []


def test_a_writer_that_lost_its_lease_deletes_nothing_more(tmp_path):
    newest = line_of_checkpoints(tmp_path, 4)
    held = iter([True, False])
    assert delete_expired(tmp_path, 1, newest, may_write=lambda: next(held)) == [10]
    assert list_checkpoints(tmp_path) == [20, 30, 40]


def test_what_cannot_be_deleted_is_logged_and_keeps_nobody_from_training(tmp_path, caplog):
    newest = line_of_checkpoints(tmp_path, 2)
    hidden = []

    def spoil(name):
        (directory,) = tmp_path.glob(".deleted-*")
        shutil.rmtree(directory)
        directory.write_text("not a directory")
        hidden.append(directory)

    install(spoil)
    try:
        assert delete_expired(tmp_path, 1, newest) == [10]
    finally:
        install(None)
    assert "is not deleted completely" in caplog.text
    assert hidden


@pytest.mark.parametrize("point", ["retention: checkpoint hidden", "retention: checkpoint deleted"])
def test_a_kill_leaves_no_half_of_a_checkpoint(tmp_path, point):
    newest = line_of_checkpoints(tmp_path, 3)

    def run():
        install(lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == point else None)
        delete_expired(tmp_path, 1, newest)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list_checkpoints(tmp_path) == [20, 30]
    assert (tmp_path / "global_step20" / FILE).read_text() == "sequence 2"
    remove_leftovers(tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert delete_expired(tmp_path, 1, newest) == [20]


def test_a_checkpoint_that_is_read_stays_with_its_descendants_until_it_no_longer_is(tmp_path):
    newest = line_of_checkpoints(tmp_path, 4)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(reading(tmp_path / "global_step20"))
        assert delete_expired(tmp_path, 1, newest) == [10]
        assert list_checkpoints(tmp_path) == [20, 30, 40]
    assert delete_expired(tmp_path, 1, newest) == [20, 30]
    assert not list(tmp_path.glob(".*"))


def test_a_reader_that_comes_while_a_checkpoint_goes_gets_it_or_is_told(tmp_path, monkeypatch):
    newest = line_of_checkpoints(tmp_path, 2)
    looks = iter([False, True])  # the mark is left between the two looks
    monkeypatch.setattr("megatron.ledger.retention.is_being_read", lambda one: next(looks))
    assert delete_expired(tmp_path, 1, newest) == []
    assert list_checkpoints(tmp_path) == [10, 20]
    with pytest.raises(CheckpointError, match=r"global_step99 is not there \(any more\)"):
        reading(tmp_path / "global_step99").__enter__()
    assert not list(tmp_path.glob(".*"))


def test_a_reader_that_was_killed_holds_nothing(tmp_path):
    newest = line_of_checkpoints(tmp_path, 2)

    def read():
        with reading(tmp_path / "global_step10"):
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join()
    assert list(tmp_path.glob(".reading-*"))
    assert delete_expired(tmp_path, 1, newest) == [10]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("age_s", "counts"), [(0, True), (500, True), (700, False)])
def test_a_reader_on_another_machine_is_believed_while_its_mark_is_touched(tmp_path, age_s, counts):
    commit(tmp_path, 1, None)
    mark = tmp_path / ".reading-global_step10-0123456789ab.json"
    mark.write_text(json.dumps(vars(ProcessIdentity("elsewhere", 7, 7))))
    then = mark.stat().st_mtime - age_s
    os.utime(mark, (then, then))
    assert is_being_read(tmp_path / "global_step10") is counts
    assert mark.exists() is counts
    assert not is_being_read(tmp_path / "global_step1")


def test_reading_where_nothing_can_be_written_goes_on_without_a_mark(tmp_path):
    commit(tmp_path, 1, None)
    # Root may write anywhere; a name longer than a file system takes fails for everybody.
    checkpoint = tmp_path / ("global_step10" + "0" * 230)
    (tmp_path / "global_step10").rename(checkpoint)
    with reading(checkpoint):
        assert not list(tmp_path.glob(".reading-*"))
