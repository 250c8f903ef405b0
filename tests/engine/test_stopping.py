"""A signal on any rank: all save after the same step, and the same command goes on exactly."""

import os
import signal
import time

import pytest

from tests.engine.killed_runs import (
    KilledRun,
    hidden_names,
    lineage,
    loaded_step,
    newest_committed,
    stop_reason,
)

pytestmark = pytest.mark.distributed

FILES = (4, 5)  # of a save, by rank


def told_after(step: int, *ranks: int, number: int = signal.SIGTERM):
    """Return what signals ``ranks`` as soon as they know the loss of a launch's ``step``-th."""

    def watch(context):
        seen = 0

        def on_loss(loss: float) -> None:
            nonlocal seen
            seen += 1
            if seen == step and context.rank in ranks:
                os.kill(os.getpid(), number)
                time.sleep(0.05)  # for the thread that listens

        return on_loss

    return watch


@pytest.fixture
def run(tmp_path) -> KilledRun:
    return KilledRun(tmp_path / "run", pipe_parallel_size=2, checkpoint_factor=100)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = KilledRun(
        tmp_path_factory.mktemp("undisturbed") / "run", pipe_parallel_size=2, checkpoint_factor=100
    )
    run.launch()
    return lineage(run.save)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("ranks", [(0, 1), (1,)], ids=["all ranks", "one rank"])
def test_all_ranks_save_two_steps_later_and_nothing_is_lost(ranks, number, run, undisturbed):
    run.launch_watched(told_after(2, *ranks, number=number))
    assert newest_committed(run.save) == 4
    assert stop_reason(run.save) == f"signal {signal.Signals(number).name}"
    assert hidden_names(run.save) == []
    run.launch()
    assert loaded_step(run.save) == 4
    assert stop_reason(run.save) == "finished"
    assert lineage(run.save) == undisturbed
