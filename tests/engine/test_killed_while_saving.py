"""Killed at any instant of a save, a run goes on as if it had never stopped.

All ranks get SIGKILL when one of them reaches a write point, or so many milliseconds into a step.
The next launch must load the checkpoint that was complete then, and take the very steps of the
undisturbed run; nothing hidden may be left when it has saved.
"""

import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from megatron.ledger.run_directory import list_checkpoints
from tests.engine.killed_runs import (
    KilledRun,
    Moment,
    Step,
    assert_good,
    hidden_names,
    lineage,
    loaded_step,
    newest_committed,
)

pytestmark = pytest.mark.distributed

RANKS = {"pipe_parallel_size": 2}
NUM_SAVES = 5  # after steps 2, 4, 6, 8, 10
# Every point that a rank reaches in the course of a save, in order. A new one belongs here.
WRITING = ["save: file opened", "save: bytes written", "save: file synced"]
POINTS = {
    0: [
        "save: directory made",
        *WRITING,
        "00000.json prepared",
        "save: entry left",
        "save: recovery scripts placed",
        "config.yml prepared",
        "commit: configs/config.yml written",
        "ledger.json prepared",
        "commit: ledger.json written",
        "commit: entries removed",
        "manifest.json prepared",
        "commit: manifest written",
        "commit: checkpoint named",
        "latest prepared",
        "commit: latest replaced",
        "commit: old checkpoint deleted",
    ],
    1: [*WRITING, "00001.json prepared", "save: entry left"],
}
COMMITTED_BY = "commit: latest replaced"
# Not of a save: data files, and the facts of an attempt, which are written at other times too.
OUTSIDE = re.compile(r"(.*_identity|.*_checked|run|\d{4})\.json prepared|lease: .*")
IN_CI = {(0, "commit: manifest written"), (0, "commit: checkpoint named"), (1, "save: file synced")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, Step]:
    run = KilledRun(tmp_path_factory.mktemp("undisturbed") / "run", **RANKS)
    for rank, reached in enumerate(run.launch()):
        counts = Counter(name for name in reached if not OUTSIDE.fullmatch(name))
        assert list(counts) == POINTS[rank], "write points have changed: POINTS must too"
        assert all(count % NUM_SAVES == 0 for count in counts.values())
    steps = lineage(run.save)
    assert list(steps) == list(range(1, 11))
    return steps


def assert_goes_on(run: KilledRun, undisturbed: dict[int, Step], **changes) -> int | None:
    """Launch again and compare; return the step that it went on from."""
    complete = newest_committed(run.save)
    run.launch(**changes)
    assert loaded_step(run.save) == complete
    assert lineage(run.save) == undisturbed
    assert hidden_names(run.save) == []
    assert newest_committed(run.save) == 10
    for step in list_checkpoints(run.save):
        assert_good(run.save, step)
    return complete


@pytest.mark.parametrize(
    ("rank", "point"),
    [
        pytest.param(rank, point, marks=() if (rank, point) in IN_CI else pytest.mark.kill)
        for rank, points in POINTS.items()
        for point in points
    ],
)
def test_killed_at_a_write_point(rank, point, undisturbed, tmp_path):
    run = KilledRun(tmp_path / "run", **RANKS)
    per_save = {"save: file opened": 4 + rank, "save: bytes written": 4 + rank}
    per_save["save: file synced"] = 4 + rank
    # In the third save, after step 6, whose predecessor is that after step 4.
    occurrence = 2 * per_save.get(point, 1) + 1
    assert run.launch_killed_at(Moment(rank, point, occurrence))
    went_on_from = assert_goes_on(run, undisturbed)
    is_committed = rank == 0 and POINTS[0].index(point) >= POINTS[0].index(COMMITTED_BY)
    assert went_on_from == (6 if is_committed else 4)


@pytest.mark.kill
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", ["save: file opened", "save: entry left"])
def test_killed_in_the_first_save(rank, point, undisturbed, tmp_path):
    run = KilledRun(tmp_path / "run", **RANKS)
    assert run.launch_killed_at(Moment(rank, point, 1))
    assert assert_goes_on(run, undisturbed) is None


@pytest.mark.kill
@pytest.mark.parametrize("point", ["0001.json prepared", "latest prepared", COMMITTED_BY])
def test_killed_in_the_last_save(point, undisturbed, tmp_path):
    run = KilledRun(tmp_path / "run", **RANKS)
    # Facts are written when the attempt begins (twice), and for every commit.
    occurrence = 2 + NUM_SAVES if point == "0001.json prepared" else NUM_SAVES
    assert run.launch_killed_at(Moment(0, point, occurrence))
    assert assert_goes_on(run, undisturbed) == (8 if point == "latest prepared" else 10)


REPLACING = ["commit: old checkpoint set aside", "commit: checkpoint named", "latest prepared"]
REPLACED = [COMMITTED_BY, "commit: old checkpoint deleted", "0002.json prepared"]


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(point, marks=() if point in (REPLACING[0], COMMITTED_BY) else pytest.mark.kill)
        for point in (*REPLACING, *REPLACED)
    ],
)
def test_killed_while_a_checkpoint_is_replaced(point, undisturbed, finished, tmp_path):
    """Rolled back to step 4, the run saves step 6 once more, and is queued again when killed."""
    shutil.copytree(finished.folder, tmp_path / "run")
    run = finished.moved(tmp_path / "run")
    occurrence = 3 if point == "0002.json prepared" else 1
    assert run.launch_killed_at(Moment(0, point, occurrence), iteration=4)
    run.launch(iteration=4)
    # Once something was saved since, the instruction has been obeyed: the run just goes on.
    assert loaded_step(run.save) == (6 if point in REPLACED else 4)
    assert lineage(run.save) == undisturbed
    assert hidden_names(run.save) == []
    for step in list_checkpoints(run.save):
        assert_good(run.save, step)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> KilledRun:
    run = KilledRun(tmp_path_factory.mktemp("finished") / "run", **RANKS)
    run.launch()
    return run


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed < 2 else pytest.mark.kill) for seed in range(52)]
)
def test_killed_at_a_random_instant(seed, undisturbed, tmp_path):
    """Up to three times, at an instant that the seed decides and the machine's mood moves."""
    rng = random.Random(seed)
    run = KilledRun(tmp_path / "run", **RANKS)
    for _ in range(1 if seed < 2 else rng.randint(1, 3)):
        run.launch_killed_after(rng.randint(1, 8), rng.uniform(0, 0.1))
    assert_goes_on(run, undisturbed)


@pytest.mark.kill
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", ["save: file opened", "save: entry left"])
def test_a_rank_that_dies_alone_takes_no_checkpoint_with_it(rank, point, undisturbed, tmp_path):
    """The others find out, wait for the save in flight as long as they may, and are killed."""
    run = KilledRun(tmp_path / "run", **RANKS)
    occurrence = 2 * (4 + rank) + 1 if point == "save: file opened" else 3
    assert run.launch_killed_at(Moment(rank, point, occurrence), alone=True)
    assert_goes_on(run, undisturbed)
    assert Path(run.save / "global_step10").exists()
