"""SIGTERM while a checkpoint is written: finished if time allows, and the status says SIGTERM."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron.base import write_points
from megatron.cli.exit_status import run_command
from megatron.engine import termination
from megatron.engine.termination import Terminated, TerminationWatch
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
from tests.worlds import WorldFailed

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
FILES = (4, 5)  # of a save, by rank


def terminate_while_writing(*ranks: int, writing_s: float, grace_s: float = 20.0):
    """Return what sends SIGTERM to ``ranks`` in their second save, which takes so long then."""

    def watch(context) -> None:
        termination.GRACE_S = grace_s
        files = 0

        def at_point(name: str) -> None:
            nonlocal files
            if name != "save: bytes written":
                return
            files += 1
            if files == FILES[context.rank] + 1:
                if context.rank in ranks:
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(writing_s)

        write_points.install(at_point)

    return watch


@pytest.fixture
def run(tmp_path) -> KilledRun:
    return KilledRun(tmp_path / "run", pipe_parallel_size=2, checkpoint_factor=4)


@pytest.mark.parametrize("ranks", [(0, 1), (1,)], ids=["all ranks", "one rank"])
def test_the_save_in_flight_is_finished_and_all_ranks_end(ranks, run):
    with pytest.raises(WorldFailed) as failed:
        run.launch_watched(terminate_while_writing(*ranks, writing_s=0.5))
    message = "Terminated: ended by SIGTERM; the checkpoint of step 8 is complete"
    assert str(failed.value).count(message) == 2
    assert newest_committed(run.save) == 8
    assert stop_reason(run.save) == "terminated"
    assert hidden_names(run.save) == []
    run.launch()
    assert loaded_step(run.save) == 8
    assert list(lineage(run.save)) == list(range(1, 11))


def test_a_save_that_would_take_too_long_is_given_up(run):
    watch = terminate_while_writing(0, 1, writing_s=2.0, grace_s=0.3)
    with pytest.raises(WorldFailed, match="the checkpoint of step 8 was given up"):
        run.launch_watched(watch)
    assert list_checkpoints(run.save) == [4]
    assert_good(run.save, 4)
    assert hidden_names(run.save) == []


def test_without_a_save_in_flight_a_rank_ends_at_once(run):
    with pytest.raises(WorldFailed, match="rank 0: died without an answer"):
        run.launch_watched(lambda context: lambda loss: os.kill(os.getpid(), signal.SIGTERM))
    assert stop_reason(run.save) is None


SLOW_SAVES = """
import sys, time
from pathlib import Path

from megatron.base import write_points
from megatron.cli.exit_status import run_command
from megatron.cli.train import main


def slow(name):
    if name == "save: file opened":
        Path(__file__).with_name("is saving").touch()
        time.sleep(0.3)


write_points.install(slow)
sys.exit(run_command(main))
"""


@pytest.mark.kill
@pytest.mark.launcher
def test_the_launcher_passes_it_on_and_its_status_says_so(run):
    script, config = run.folder / "slow_train.py", run.folder / "run.yml"
    script.write_text(SLOW_SAVES)
    config.write_text(yaml.safe_dump(run.config))
    command = [sys.executable, str(ROOT / "deepy.py"), str(script), str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher:
        while not (run.folder / "is saving").exists():
            assert launcher.poll() is None
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        _, told = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "the checkpoint of step 4 is complete" in told
    assert newest_committed(run.save) == 4
    assert stop_reason(run.save) == "terminated"
    assert hidden_names(run.save) == []


def ended_by(command) -> int | None:
    """Return how a process ends that runs ``command`` as our scripts do."""

    def main() -> None:
        os._exit(run_command(command))

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join()
    return process.exitcode


def test_the_exit_status_is_that_of_sigterm(capfd):
    def command() -> None:
        raise Terminated("ended by SIGTERM; the checkpoint of step 8 is complete")

    assert ended_by(command) == -signal.SIGTERM
    assert "the checkpoint of step 8 is complete" in capfd.readouterr().err


def test_a_handler_of_the_users_is_left_alone():
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        theirs = signal.getsignal(signal.SIGTERM)
        watch = TerminationWatch()
        watch.begin()
        assert signal.getsignal(signal.SIGTERM) is theirs
        watch.end()
        assert signal.getsignal(signal.SIGTERM) is theirs
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_signal_is_noted_and_ends_the_process_again_afterwards():
    watch = TerminationWatch()
    watch.begin()
    assert watch.seconds_left == float("inf")
    os.kill(os.getpid(), signal.SIGTERM)
    assert watch.has_come
    assert 0 < watch.seconds_left <= termination.GRACE_S
    watch.end()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
