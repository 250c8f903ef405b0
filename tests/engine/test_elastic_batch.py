"""Fewer ranks and more again under ``elastic_batch``: each step reads what it would have read."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.engine.interrupted_runs import SEED, SEQ_LENGTH, InterruptedRun
from tests.engine.slow_orders import SlowDataset, SlowStream, split_documents, write_dataset
from tests.engine.test_launched_changes import ThroughLauncher
from tests.engine.training_runs import run_training

pytestmark = pytest.mark.distributed

SPLIT = "80,10,10"
BATCH, TRAIN_ITERS = 12, 12
ELASTIC = {
    "elastic_batch": True,
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": None,
    "train_iters": TRAIN_ITERS,
    "zero_optimization": {"stage": 1},
}


def elastic_run(folder: Path, run: type[InterruptedRun] = InterruptedRun) -> InterruptedRun:
    prefix = write_dataset(folder / "data" / "a", 1)
    return run(folder, {"data_path": str(prefix), "split": SPLIT}, **ELASTIC)


def expected_steps(folder: Path) -> dict[int, tuple[int, int, str]]:
    """Return what the undisturbed order gives each step, read slowly."""
    train, _, _ = split_documents(SPLIT, 40)
    samples = TRAIN_ITERS * BATCH
    stream = SlowStream([SlowDataset(folder / "data" / "a", SEQ_LENGTH, SEED, samples, train)])
    return {step: stream.step(BATCH) for step in range(1, TRAIN_ITERS + 1)}


def assert_all_read(run: InterruptedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.read().steps == expected_steps(run.folder)
    status, printed = run.verify(capsys)
    assert status == 0, printed


def division(printed: str) -> list[str]:
    return re.findall(r"elastic_batch: .*? data-parallel ranks(?: \(was .*?\))?", printed)


def test_four_ranks_then_three_then_four(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = elastic_run(tmp_path)
    run.launch_killed(after=4, num_gpus=4)
    run.launch_killed(after=7, num_gpus=3)
    last = run.launch(num_gpus=4)
    assert_all_read(run, capsys)
    assert division(last.printed) == [
        "elastic_batch: 12 samples = micro batch 1 x accumulation 3 x 4 data-parallel ranks "
        "(was 2 x 2 x 3)"
    ]


@pytest.mark.matrix
@pytest.mark.launcher
def test_through_the_launcher_two_slots_then_one_then_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = elastic_run(tmp_path, ThroughLauncher)
    run.launch(num_gpus=2, exit_interval=3)
    second = run.launch(num_gpus=1, exit_interval=6)
    # The launcher says it, and then the plan, which knows what the checkpoint had.
    assert division(second.printed)[-1] == (
        "elastic_batch: 12 samples = micro batch 2 x accumulation 6 x 1 data-parallel ranks "
        "(was 2 x 3 x 2)"
    )
    run.launch(num_gpus=2)
    assert_all_read(run, capsys)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "worlds",
    [(4, 2, 3, 1), (1, 4, 2, 3)],
    ids=lambda worlds: " then ".join(map(str, worlds)),
)
def test_losses_are_those_of_ranks_that_never_changed(
    worlds: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = elastic_run(tmp_path)
    losses: list[float] = []
    for number, ranks in enumerate(worlds[:-1], start=1):
        losses += run.launch(num_gpus=ranks, exit_interval=3 * number).losses
    losses += run.launch(num_gpus=worlds[-1]).losses
    assert len(losses) == TRAIN_ITERS
    assert_all_read(run, capsys)
    alone: dict[str, Any] = {"num_gpus": 2, "save": str(tmp_path / "other"), "load": None}
    undisturbed = run_training(run.changed(alone), tmp_path / "undisturbed")
    assert losses == pytest.approx(undisturbed.losses, rel=1e-5)
