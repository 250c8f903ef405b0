"""A disk that fills up while a run saves: told on all ranks, obeyed as on_save_error says.

Where a file system can be mounted the disk is a small one in memory; everywhere a limit on the size
of files stands in for it, which the system enforces in the same place with the same words.
"""

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron.base import write_points
from megatron.ledger.run_directory import list_checkpoints
from tests.engine.killed_runs import (
    KilledRun,
    assert_good,
    hidden_names,
    lineage,
    loaded_step,
    newest_committed,
    stop_reason,
)
from tests.worlds import RankContext, WorldFailed

pytestmark = pytest.mark.distributed

FILES = (4, 5)  # of a save, by rank
DISK_BYTES = 8 << 20
# Attempts and pointers are small files; layers and optimizer states aren't.
ROOM_BYTES = 24 << 10
SAVES = [2, 4, 6, 8, 10]
FAILING, LAST_GOOD = 4, 2


@dataclass(frozen=True)
class Disk:
    """Where a run saves, and how its disk gets full during the second save."""

    fill: Callable[[RankContext], Callable[[str], None]]
    """Of a rank: what happens at its write points."""
    said: str


def nth(wanted: str, number: int, act: Callable[[], None]) -> Callable[[str], None]:
    """Return a hook that acts when the write point ``wanted`` is reached for the n-th time."""
    left = number

    def at_point(name: str) -> None:
        nonlocal left
        if name == wanted:
            left -= 1
            if left == 0:
                act()

    return at_point


def in_turn(*hooks: Callable[[str], None]) -> Callable[[str], None]:
    return lambda name: [hook(name) for hook in hooks] and None


@pytest.fixture
def mounted(tmp_path) -> Iterator[Path]:
    place = tmp_path / "run" / "save"
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system; the limit stands in for it")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill_mounted(place: Path, rank: int, *, is_cleared: bool) -> Disk:
    ballast = place / "ballast"

    def fill() -> None:
        system = os.statvfs(place)
        with open(ballast, "wb") as file:
            file.write(bytes(system.f_bavail * system.f_frsize - ROOM_BYTES))

    def at_points(context: RankContext) -> Callable[[str], None]:
        hooks = []
        if context.rank == rank:
            # As it opens the last file of its second save, the optimizer's.
            hooks.append(nth("save: file opened", 2 * FILES[rank], fill))
        if context.rank == 0 and is_cleared:
            hooks.append(nth("save: directory made", 3, ballast.unlink))
        return in_turn(*hooks)

    return Disk(at_points, "No space left on device")


def limit_files(rank: int) -> Disk:
    def limit(num_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

    def at_points(context: RankContext) -> Callable[[str], None]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if context.rank != rank:
            return in_turn()
        last, next_one = 2 * FILES[rank], 2 * FILES[rank] + 1
        return in_turn(
            nth("save: file opened", last, lambda: limit(ROOM_BYTES)),
            nth("save: file opened", next_one, lambda: limit(resource.RLIM_INFINITY)),
        )

    return Disk(at_points, "File too large")


def assert_stops(run: KilledRun, disk: Disk, rank: int) -> None:
    with pytest.raises(WorldFailed) as failed:
        run.launch_watched(lambda context: write_points.install(disk.fill(context)))
    told = str(failed.value)
    assert told.count(f"CheckpointError: rank {rank}: ") == 2
    assert disk.said in told
    assert stop_reason(run.save) == "failed: CheckpointError"
    assert list_checkpoints(run.save) == [LAST_GOOD]
    assert newest_committed(run.save) == LAST_GOOD
    assert hidden_names(run.save) == []


def assert_goes_on(run: KilledRun, disk: Disk) -> None:
    run.launch_watched(
        lambda context: write_points.install(disk.fill(context)), on_save_error="continue"
    )
    (output,) = run.folder.glob("launch-*/output-0.txt")
    text = output.read_text()
    assert text.count("WARNING: A CHECKPOINT FAILED") == 1
    assert disk.said in text
    assert f"the newest complete one is global_step{LAST_GOOD}" in text
    assert stop_reason(run.save) == "finished"
    assert list_checkpoints(run.save) == [step for step in SAVES if step != FAILING]
    for step in list_checkpoints(run.save):
        assert_good(run.save, step)
    assert hidden_names(run.save) == []
    assert list(lineage(run.save)) == list(range(1, 11))


@pytest.fixture
def run(tmp_path) -> KilledRun:
    return KilledRun(tmp_path / "run", pipe_parallel_size=2, hidden_size=32)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_stops_all_ranks_and_earlier_checkpoints_stand(rank, mounted, run):
    assert_stops(run, fill_mounted(mounted, rank, is_cleared=False), rank)
    (mounted / "ballast").unlink()
    run.launch()
    assert loaded_step(run.save) == LAST_GOOD
    assert list_checkpoints(run.save) == SAVES


def test_a_full_disk_is_lived_with_if_the_user_says_so(mounted, run):
    assert_goes_on(run, fill_mounted(mounted, 1, is_cleared=True))


def test_a_limit_on_files_stops_all_ranks(run):
    assert_stops(run, limit_files(1), 1)


def test_a_limit_on_files_is_lived_with_if_the_user_says_so(run):
    assert_goes_on(run, limit_files(1))


def test_a_disk_too_small_for_a_checkpoint_is_found_out_beforehand(mounted, run):
    with open(mounted / "ballast", "wb") as file:
        file.write(bytes(DISK_BYTES - (1 << 20)))
    with pytest.raises(WorldFailed, match=r"the checkpoint of step 2 needs \d+\.\d MB, but .* has"):
        run.launch()
    assert hidden_names(run.save) == []
    assert stop_reason(run.save) == "failed: CheckpointError"


def test_a_last_checkpoint_that_is_missing_is_an_error_whatever_the_user_says(run):
    def watch(context: RankContext) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, resource.RLIM_INFINITY))

        if context.rank == 1:
            write_points.install(nth("save: file opened", 5 * FILES[1], limit))

    with pytest.raises(WorldFailed, match="its last checkpoint, of step 10, could not be saved"):
        run.launch_watched(watch, on_save_error="continue")
    assert newest_committed(run.save) == 8


def test_a_run_that_lost_its_directory_ends_whatever_the_user_says(run):
    def watch(context: RankContext) -> None:
        def take_over() -> None:
            (run.save / "lock.json").write_text("another job's")

        if context.rank == 0:
            write_points.install(nth("commit: manifest written", 2, take_over))

    with pytest.raises(WorldFailed, match="is no longer this job's"):
        run.launch_watched(watch, on_save_error="continue")
    assert list_checkpoints(run.save) == [LAST_GOOD]
