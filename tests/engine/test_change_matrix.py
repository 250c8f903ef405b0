"""Interrupted, changed, launched again: what was read against an oracle that is slow and plain."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engine.interrupted_runs import SEED, SEQ_LENGTH, InterruptedRun
from tests.engine.slow_orders import SlowDataset, SlowStream, split_documents, write_dataset

pytestmark = pytest.mark.distributed

SPLIT = "80,10,10"
BATCH = 8
TRAIN_ITERS = 12
MIDDLE, AT_SAVE = 5, 6  # killed after these steps: 3 and 6 are saved, 6 is evaluated too
SAVED = {MIDDLE: 3, AT_SAVE: 6}


@dataclass(frozen=True)
class Phase:
    """Steps of the final lineage that were taken under the same settings."""

    last_step: int
    batch: int = BATCH
    eval_interval: int = 6
    eval_iters: int = 1


def split_run(folder: Path, **changes: Any) -> InterruptedRun:
    """Return a run of one dataset and a split."""
    prefix = write_dataset(folder / "data" / "a", 1)
    return InterruptedRun(folder, {"data_path": str(prefix), "split": SPLIT}, **changes)


def split_streams(
    prefix: Path, *, train_iters: int = TRAIN_ITERS, seq_length: int = SEQ_LENGTH, seed: int = SEED
) -> tuple[SlowStream, SlowStream]:
    train, valid, _ = split_documents(SPLIT, 40)
    wanted = train_iters * BATCH, (train_iters // 6 + 1) * BATCH
    streams = [
        SlowStream([SlowDataset(prefix, seq_length, seed, samples, documents)])
        for samples, documents in zip(wanted, (train, valid), strict=True)
    ]
    return streams[0], streams[1]


def assert_read(run: InterruptedRun, train: SlowStream, valid: SlowStream, *phases: Phase) -> None:
    """Compare every step and evaluation of the lineage with the oracle's."""
    expected: dict[int, tuple[int, int, str]] = {}
    evaluations = []
    step = 0
    for phase, following in zip(phases, [*phases[1:], phases[-1]], strict=True):
        while step < phase.last_step:
            step += 1
            expected[step] = train.step(phase.batch)
            if step % phase.eval_interval == 0:
                # The checkpoint lies before it: whoever goes on from there makes it.
                by = following if step == phase.last_step else phase
                evaluations.append((step, valid.step(by.eval_iters * by.batch)))
    read = run.read()
    assert read.steps == expected
    assert read.evaluations == evaluations
    last = phases[-1]
    assert read.at_end["valid"] == valid.preview(last.eval_iters * last.batch)


def assert_verified(run: InterruptedRun, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = run.verify(capsys)
    assert status == 0, printed


DIVISIONS = {
    "micro batch": {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
    "gradient accumulation": {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
    },
    "DP 2": {
        "num_gpus": 2,
        "gradient_accumulation_steps": 1,
        "no_load_optim": True,  # resharding the optimizer is the checkpoint issue's
    },
    "two workers": {"num_workers": 2},
}
BATCHES = {"a larger batch": (4, 16), "a smaller batch": (1, 4)}


@pytest.mark.parametrize("killed_after", [MIDDLE, AT_SAVE], ids=["between saves", "at a save"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, marks=() if change in ("DP 2",) else pytest.mark.matrix)
        for change in DIVISIONS
    ],
)
def test_dividing_a_batch_otherwise_changes_no_sample(
    change: str, killed_after: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = split_run(tmp_path)
    run.launch_killed(after=killed_after)
    run.launch(**DIVISIONS[change])
    assert_read(run, *split_streams(tmp_path / "data" / "a"), Phase(TRAIN_ITERS))
    assert_verified(run, capsys)
