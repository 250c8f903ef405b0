"""What the launcher notes and tells when its ranks couldn't."""

import signal

import pytest

from megatron.base.exit_codes import HUNG, NODE_LOST
from megatron.cli.launch_end import note_end
from megatron.engine.launch.conclusion import JobEnd
from megatron.engine.launch.failures import RankEnd
from megatron.engine.launch.rank_process import Exit
from megatron.engine.launch.watchdog import RankProgress
from megatron.ledger.attempt_facts import read_attempt_facts
from megatron.ledger.run_directory import write_latest
from tests.ledger.recorded_runs import TestRun

KILLED = Exit(None, signal.SIGKILL)


def rank_end(exit: Exit = KILLED, *, was_told: bool = True, **more) -> RankEnd:
    progress = RankProgress(0, "n", 1, more.pop("phase", "step"), 8, 61.0, 60.0, "runs")
    values = {"ended_at": 9.0, "trace_began_at": None, "excerpt": "", "progress": progress}
    return RankEnd(0, 1, exit, was_told=was_told, **(values | more))


@pytest.fixture
def run(tmp_path):
    run = TestRun.start(tmp_path / "run", environment={"launch": "ours"})
    run.steps(1, 4)
    run.save_checkpoint()
    write_latest(run.save, 4)
    run.steps(5, 6)
    return run


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (
            JobEnd((rank_end(),), hang="rank 3: step 9 for 60 s, limit 60 s"),
            "hung: rank 0 (n, process 1): step 8 for 61 s, limit 60 s",
        ),
        (
            JobEnd((rank_end(),), lost=("node2: no sign of life for 30 s",)),
            "node lost: node2: no sign of life for 30 s",
        ),
        (JobEnd((rank_end(was_told=False),)), "failed: rank 0: killed by SIGKILL"),
        (JobEnd((rank_end(),), wishes=(signal.SIGTERM,)), "signal SIGTERM"),
    ],
)
def test_the_reason_is_noted_and_where_the_same_command_goes_on_is_told(run, end, reason):
    assert note_end(run.save, "ours", end) == (
        "the same command goes on from global_step4; steps 5..7 will be done again, with the same "
        "samples"
    )
    stop = read_attempt_facts(run.save, 1).stop
    assert (stop.reason, stop.step, stop.done_step) == (reason, 6, 7)


def test_statuses_tell_hangs_and_lost_nodes_apart():
    assert JobEnd((rank_end(),), hang="rank 3: step 9").status == HUNG
    assert JobEnd((rank_end(),), lost=("node2: gone",)).status == NODE_LOST


def test_a_step_that_is_saved_is_not_done_again(run):
    (run.save / "global_step8").mkdir()
    write_latest(run.save, 8)
    told = note_end(run.save, "ours", JobEnd((rank_end(phase="save"),), hang="rank 3: step 9"))
    assert told == "the same command goes on from global_step8"


def test_without_a_checkpoint_everything_is_done_again(tmp_path):
    run = TestRun.start(tmp_path / "run", environment={"launch": "ours"})
    assert note_end(run.save, "ours", JobEnd((rank_end(was_told=False),))) == (
        "no checkpoint was saved; the same command begins again; steps 1..7 will be done again, "
        "with the same samples"
    )


def test_a_launch_that_ended_well_or_made_no_attempt_says_nothing(run):
    assert note_end(run.save, "ours", JobEnd((rank_end(Exit(0)),))) is None
    assert note_end(run.save, "ours", JobEnd((rank_end(Exit(75)),))) is None
    assert note_end(run.save, "theirs", JobEnd((rank_end(),))) is None
    assert read_attempt_facts(run.save, 1).stop is None


def test_a_record_that_cannot_be_read_is_told_and_no_error(run):
    (run.save / "attempts" / "0001.json").write_text("{")
    told = note_end(run.save, "ours", JobEnd((rank_end(),), hang="rank 3: step 9"))
    assert told.startswith(f"the end could not be noted in {run.save}: ")
