"""A stop at any moment: all ranks save after the same step; the same command goes on exactly."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from megatron.base import write_points
from megatron.cli import train as training_command
from megatron.engine import loop, stop_signals
from megatron.engine.steps import MicroBatchSource
from megatron.ledger.lease import Lease
from megatron.ledger.run_directory import list_checkpoints
from tests.engine.killed_runs import (
    KilledRun,
    hidden_names,
    lineage,
    loaded_step,
    newest_committed,
    stop_reason,
)
from tests.worlds import WorldFailed

pytestmark = pytest.mark.distributed

FILES = (4, 5)  # of a save, by rank
TWO_STAGES = {"pipe_parallel_size": 2, "checkpoint_factor": 4, "eval_iters": 6}


def tell(number: int = signal.SIGTERM) -> None:
    """Send a signal to this process, and let the thread that listens have it."""
    os.kill(os.getpid(), number)
    time.sleep(0.05)


def told_after(step: int, *ranks: int, number: int = signal.SIGTERM):
    """Return what signals ``ranks`` as soon as they know the loss of a launch's ``step``-th."""

    def watch(context):
        seen = 0

        def on_loss(loss: float) -> None:
            nonlocal seen
            seen += 1
            if seen == step and context.rank in ranks:
                tell(number)

        return on_loss

    return watch


def evaluations(save: Path) -> list[tuple]:
    """Return the evaluations of a run's last two attempts, each as often as it was recorded."""
    return [
        tuple(line[name] for name in ("stream", "after_step", "position", "samples", "loss"))
        for path in sorted((save / "attempts").glob("*.jsonl"))
        for line in map(json.loads, path.read_text().splitlines())
        if "stream" in line
    ]


@pytest.fixture
def run(tmp_path) -> KilledRun:
    return KilledRun(tmp_path / "run", **TWO_STAGES)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = KilledRun(tmp_path_factory.mktemp("undisturbed") / "run", **TWO_STAGES)
    run.launch()
    return lineage(run.save), evaluations(run.save)


def assert_goes_on_from(step: int, run: KilledRun, undisturbed) -> None:
    assert newest_committed(run.save) == step
    assert hidden_names(run.save) == []
    run.launch()
    assert loaded_step(run.save) == step
    assert stop_reason(run.save) == "finished"
    assert (lineage(run.save), evaluations(run.save)) == undisturbed


@pytest.mark.parametrize(
    ("ranks", "number"),
    [
        ((1,), signal.SIGUSR1),
        pytest.param((0, 1), signal.SIGTERM, marks=pytest.mark.kill),
        pytest.param((0,), signal.SIGINT, marks=pytest.mark.kill),
    ],
)
def test_all_ranks_save_two_steps_later_and_nothing_is_lost(ranks, number, run, undisturbed):
    run.launch_watched(told_after(5, *ranks, number=number))
    assert stop_reason(run.save) == f"signal {signal.Signals(number).name}"
    assert list_checkpoints(run.save) == [4, 7]
    assert_goes_on_from(7, run, undisturbed)


@pytest.mark.parametrize("is_after_the_look", [False, pytest.param(True, marks=pytest.mark.kill)])
def test_right_before_the_loop_all_ranks_begin_it_or_none(is_after_the_look, run):
    def watch(context) -> None:
        told_to_stop = training_command._told_to_stop

        def told(*arguments):
            if context.rank == 1 and not is_after_the_look:
                tell()
            reason = told_to_stop(*arguments)
            if context.rank == 1 and is_after_the_look:
                tell()
            return reason

        training_command._told_to_stop = told

    run.launch_watched(watch)
    assert newest_committed(run.save) == (3 if is_after_the_look else None)
    assert stop_reason(run.save) == "signal SIGTERM"
    assert hidden_names(run.save) == []


@pytest.mark.kill
def test_in_the_middle_of_an_accumulation(run, undisturbed):
    def watch(context) -> None:
        read, micro_batches = MicroBatchSource.__next__, 0

        def tell_in_between(source):
            nonlocal micro_batches
            micro_batches += 1
            if micro_batches == 4 and context.rank == 1:  # the second one of step 2
                tell()
            return read(source)

        MicroBatchSource.__next__ = tell_in_between

    run.launch_watched(watch)
    assert_goes_on_from(4, run, undisturbed)


def test_an_evaluation_is_cut_short_and_done_again_as_a_whole(run, undisturbed):
    def watch(context) -> None:
        evaluate = loop.evaluate

        def told_in_evaluation(*arguments, goes_on, **named):
            batches = 0

            def count() -> bool:
                nonlocal batches
                batches += 1
                if batches == 2 and context.rank == 0:
                    tell()
                return goes_on()

            loss = evaluate(*arguments, goes_on=count, **named)
            assert (loss, batches) == (None, 4)
            return loss

        loop.evaluate = told_in_evaluation

    run.launch_watched(watch)
    assert evaluations(run.save) == []
    assert_goes_on_from(4, run, undisturbed)


def slow_saves(context) -> None:
    def at_point(name: str) -> None:
        if name == "save: bytes written":
            time.sleep(0.2)

    write_points.install(at_point)


@pytest.mark.parametrize(
    ("after", "saved"), [pytest.param(2, [4], marks=pytest.mark.kill), (3, [4, 5])]
)
def test_a_save_that_is_due_or_in_flight_is_the_stops_or_is_waited_for(after, saved, run):
    def watch(context):
        slow_saves(context)
        return told_after(after, 1)(context)

    run.launch_watched(watch, eval_interval=100)
    facts = json.loads((run.save / "attempts" / "0001.json").read_text())
    assert [one["step"] for one in facts["committed"]] == saved
    assert newest_committed(run.save) == saved[-1]
    assert hidden_names(run.save) == []


@pytest.mark.kill
def test_after_the_last_step(run, undisturbed):
    run.launch_watched(told_after(10, 1))
    assert stop_reason(run.save) == "signal SIGTERM"
    assert newest_committed(run.save) == 10
    run.launch()
    assert stop_reason(run.save) == "finished"
    assert evaluations(run.save) == undisturbed[1]


def test_a_second_signal_leaves_at_once_and_the_checkpoint_before_stands(run, undisturbed):
    def watch(context):
        os.environ.pop("SLURM_JOB_ID", None)
        stop_signals.ONE_WISH_S = 0.1
        files = 0

        def at_point(name: str) -> None:
            nonlocal files
            files += name == "save: bytes written"
            if files == FILES[context.rank] + 2:  # in the stop's save
                threading.Timer(0.2, tell).start()
                time.sleep(60)

        write_points.install(at_point)
        return told_after(5, 0, 1)(context)

    began = time.monotonic()
    with pytest.raises(WorldFailed, match="died without an answer"):
        run.launch_watched(watch)
    assert time.monotonic() - began < 30
    assert stop_reason(run.save) is None
    assert newest_committed(run.save) == 4
    run.launch()
    assert loaded_step(run.save) == 4
    assert hidden_names(run.save) == []
    assert lineage(run.save) == undisturbed[0]


@pytest.mark.kill
def test_time_that_is_up_lets_every_launch_go_a_little_further(run):
    for step in (3, 6, 9):
        run.launch(exit_duration_in_mins=0.001, eval_interval=100)
        assert newest_committed(run.save) == step
        assert stop_reason(run.save) == "time limit"
    (output,) = run.folder.glob("launch-1/output-0.txt")
    told = output.read_text()
    assert "exit_duration_in_mins: 0.001" in told
    assert "stopping at iteration 3: time limit (exit_duration_in_mins: 0.001 ends this" in told


def test_slurms_time_limit_is_known_and_the_job_is_on_record(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "123456789")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time())))  # now
    run.launch()
    assert newest_committed(run.save) == 3
    assert stop_reason(run.save) == "time limit"
    environment = json.loads((run.save / "attempts" / "0001.json").read_text())["environment"]
    assert environment["nodes"] == [socket.gethostname()]
    assert environment["job"]["SLURM_JOB_ID"] == "123456789"
    assert environment["job"]["SLURM_RESTART_COUNT"] == "2"


@pytest.mark.kill
def test_a_run_that_has_lost_its_directory_ends_with_the_reason_on_all_ranks(run):
    def watch(context):
        Lease.start_heartbeat.__defaults__ = (0.02,)
        seen = 0

        def on_loss(loss: float) -> None:
            nonlocal seen
            seen += 1
            if seen == 5 and context.rank == 0:
                while not (run.save / "latest").exists():
                    time.sleep(0.01)
                lock = run.save / "lock.json"
                values = json.loads(lock.read_text()) | {"token": 32 * "a"}
                (run.save / "other").write_text(json.dumps(values) + "\n")
                (run.save / "other").rename(lock)
                time.sleep(0.3)

        return on_loss

    with pytest.raises(WorldFailed) as failed:
        run.launch_watched(watch)
    told = f"RunDirectoryError: {run.save} is no longer this job's"
    assert str(failed.value).count(told) == 2
    assert list_checkpoints(run.save) == [4]
    assert stop_reason(run.save) == "failed: RunDirectoryError"


@pytest.mark.kill
def test_without_save_there_is_nothing_to_save(run):
    run.launch_watched(told_after(2, 1), save=None, load=None)
    (output,) = run.folder.glob("launch-1/output-0.txt")
    assert "stopping at iteration 4: signal SIGTERM (rank 1 got it)\n" in output.read_text()
    assert not run.save.exists()
