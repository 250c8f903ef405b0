"""The change matrix as users meet it: `deepy.py train.py`, killed, changed, started again.

What was read is compared with the same slow oracle as in test_change_matrix.py.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.ledger.attempts import attempt_files, read_attempt
from tests.engine.interrupted_runs import InterruptedRun, last_recorded_step
from tests.engine.slow_orders import write_dataset
from tests.engine.test_change_matrix import (
    AT_SAVE,
    BATCH,
    BLENDS,
    MIDDLE,
    SPLIT,
    TRAIN_ITERS,
    BlendedRun,
    Phase,
    assert_read,
    assert_verified,
    reshard,
    split_streams,
)
from tests.engine.training_runs import TrainedRun

pytestmark = pytest.mark.launcher

ROOT = Path(__file__).parents[2]


class ThroughLauncher(InterruptedRun):
    """A run whose every launch is ``python deepy.py SCRIPT CONFIG``."""

    def launch(self, **changes: Any) -> TrainedRun:
        ended = self.started(ROOT / "train.py", changes, {})
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
        records = list(read_attempt(attempt_files(self.save)[-1]))
        return TrainedRun([one.loss for one in records], records, ended.stdout)

    def launch_killed(self, *, after: int, **changes: Any) -> None:
        script = ROOT / "tests" / "engine" / "dying_train.py"
        environ = {"DIES_AFTER": str(after), "PYTHONPATH": str(ROOT)}
        ended = self.started(script, changes, environ)
        assert ended.returncode != 0
        assert "SIGKILL" in ended.stdout + ended.stderr, ended.stderr[-3000:]
        assert last_recorded_step(self.save) == after

    def started(
        self, script: Path, changes: Mapping[str, Any], environ: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Return how a launch ended."""
        folder = self._next_folder()
        path = folder / "config.yml"
        path.write_text(yaml.safe_dump(self.changed(changes)))
        command = [sys.executable, str(ROOT / "deepy.py"), str(script), str(path)]
        return subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


class LaunchedBlend(ThroughLauncher, BlendedRun):
    """A blend, through the launcher."""


def split_run(folder: Path, **changes: Any) -> ThroughLauncher:
    prefix = write_dataset(folder / "data" / "a", 1)
    return ThroughLauncher(folder, {"data_path": str(prefix), "split": SPLIT}, **changes)


def test_killed_then_two_ranks_instead_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = split_run(tmp_path)
    run.launch_killed(after=MIDDLE)
    again = run.launch(num_gpus=2, gradient_accumulation_steps=1, num_workers=2)
    assert again.records[0].step == 4
    assert f"continues {run.save / 'global_step3'} (run " in again.printed
    assert_read(run, *split_streams(tmp_path / "data" / "a"), Phase(TRAIN_ITERS))
    assert_verified(run, capsys)


def test_killed_at_a_save_then_three_changes_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = LaunchedBlend(tmp_path, "ab", [1.0, 1.0])
    run.launch_killed(after=AT_SAVE)
    blend = "bca", [2.0, 1.0, 1.0]
    run.launch(
        **run.drawing(*blend),
        train_iters=30,
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=12,
    )
    expected = [run.train.step(BATCH) for _ in range(AT_SAVE)]
    run.draws(*blend)
    expected += [run.train.step(12) for _ in range(30 - AT_SAVE)]
    assert run.read().steps == dict(enumerate(expected, 1))
    assert_verified(run, capsys)


@pytest.mark.matrix
@pytest.mark.parametrize(("accumulation", "batch"), [(4, 16), (1, 4)])
def test_another_batch_size(
    accumulation: int, batch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = split_run(tmp_path)
    run.launch_killed(after=MIDDLE)
    run.launch(gradient_accumulation_steps=accumulation)
    streams = split_streams(tmp_path / "data" / "a")
    assert_read(run, *streams, Phase(3), Phase(TRAIN_ITERS, batch))
    assert_verified(run, capsys)


@pytest.mark.matrix
def test_extended_over_two_and_a_half_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = split_run(tmp_path)
    run.launch(train_iters=3)
    run.launch(train_iters=18)
    assert_read(run, *split_streams(tmp_path / "data" / "a", train_iters=3), Phase(18))
    assert_verified(run, capsys)


@pytest.mark.matrix
def test_datasets_added_removed_and_returned(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    blends = BLENDS["added, removed, returned"]
    run = LaunchedBlend(tmp_path, *blends[0])
    for blend, step in zip(blends, [5, 8, 10], strict=False):
        run.launch_killed(after=step, **run.drawing(*blend))
    run.launch(**run.drawing(*blends[-1]))
    expected = [run.train.step(BATCH) for _ in range(3)]
    for blend in blends[1:]:
        run.draws(*blend)
        expected += [run.train.step(BATCH) for _ in range(3)]
    assert run.read().steps == dict(enumerate(expected, 1))
    assert_verified(run, capsys)


@pytest.mark.matrix
def test_a_dataset_moved_renamed_and_cut_in_three(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = split_run(tmp_path)
    streams = split_streams(tmp_path / "data" / "a")
    run.launch_killed(after=MIDDLE)
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    for suffix in ("bin", "idx"):
        Path(f"{tmp_path / 'data' / 'a'}.{suffix}").rename(f"{moved}.{suffix}")
    reshard(moved)
    run.launch(data_path=str(moved))
    assert_read(run, *streams, Phase(TRAIN_ITERS))
    assert_verified(run, capsys)


@pytest.mark.matrix
def test_rolled_back_saved_killed_and_the_same_command_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = split_run(tmp_path)
    run.launch_killed(after=10)
    run.launch_killed(after=7, iteration=3, gradient_accumulation_steps=4)
    again = run.launch(iteration=3, gradient_accumulation_steps=4)
    assert again.records[0].step == 7
    streams = split_streams(tmp_path / "data" / "a")
    assert_read(run, *streams, Phase(3), Phase(TRAIN_ITERS, 16))
    assert_verified(run, capsys)


@pytest.mark.matrix
def test_finetuned_and_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parent = split_run(tmp_path / "parent")
    parent.launch(train_iters=3)
    run = split_run(tmp_path / "child", load=str(parent.save), finetune=True)
    run.launch_killed(after=MIDDLE)
    assert run.launch().records[0].step == 4
    assert_read(run, *split_streams(tmp_path / "child" / "data" / "a"), Phase(TRAIN_ITERS))
    assert_verified(run, capsys)


@pytest.mark.matrix
def test_another_seed_is_refused_before_a_rank_is_started_and_goes_on_when_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = split_run(tmp_path)
    run.launch_killed(after=MIDDLE)
    refused = run.started(ROOT / "train.py", run.changed({"seed": 7}), {})
    assert refused.returncode != 0
    assert "cannot go on exactly after step 3" in refused.stdout + refused.stderr
    assert "starting 1 ranks" not in refused.stdout
    run.launch(seed=7, accept_data_change=["seed"])
    status, printed = run.verify(capsys)
    assert status == 0, printed
    assert "break      after step 3, as accepted (seed)" in printed
