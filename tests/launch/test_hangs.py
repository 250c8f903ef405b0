"""A rank that hangs ends the job, with all stacks, and is named; a healthy job is left alone."""

import os
import re
import signal
import time

import pytest

from megatron.base.exit_codes import HUNG
from tests.launch.launches import Finished, launch, run, wait_for

# Steps of 50 ms that all ranks take together, and that may take 0.8 s.
STEPS = """
from megatron.base.progress import progress_of_this_process
progress = progress_of_this_process()
def wait_for_others(step):
    open(f"{step}.{rank}", "w").close()
    while not os.path.exists(f"{step}.{1 - rank}"):
        time.sleep(0.01)
def train(hang, steps=3):
    progress.enter("step")
    for step in range(1, steps + 1):
        progress.step(step, 0.8)
        if rank == 1 and step == 3:
            hang()
        wait_for_others(step)
        time.sleep(0.05)
"""
HANGS = {
    "is stopped": "lambda: os.kill(os.getpid(), signal.SIGSTOP)",
    "holds Python's lock": "lambda: __import__('ctypes').PyDLL(None).sleep(60)",
}


def report(finished: Finished) -> list[str]:
    """Return the last words of a job."""
    lines = finished.stderr.splitlines()
    return [line for line in lines if line.startswith("---- ")]


@pytest.mark.parametrize("how", HANGS)
def test_a_hang_ends_the_job_and_the_stacks_of_all_ranks_are_told(tmp_path, how):
    finished = run(f"{STEPS}\ntrain({HANGS[how]})", 2, tmp_path, TEST_LOOK_EVERY_S="0.2")
    assert finished.status == HUNG
    assert finished.seconds < 9  # 0.8 s, two looks, 2 s for the stacks, 1.2 s to end
    lines = finished.stderr.splitlines()
    hang = next(line for line in lines if ": step 3 for " in line)
    assert hang.startswith("deepy: no progress: rank ")
    assert ", limit 0.8 s" in hang
    for rank, frame in ((0, "wait_for_others"), (1, "train")):
        stack = [line for line in lines if line.startswith(f"[rank{rank}]:   File ")]
        assert any(line.endswith(f" in {frame}") for line in stack)
    what, heading, first, second, end = report(finished)
    assert what.startswith("---- deepy: no progress: rank ")
    assert heading == "---- of 2 ranks the one to look at first:"
    assert end == f"---- the job ends with status {HUNG}"
    named = [line.split()[2] for line in (first, second)]
    assert sorted(named) == ["0", "1"]
    if how == "is stopped":
        assert named == ["1", "0"]
        assert "; it is stopped; in " in first


# Rank 1 hangs before a collective that rank 0 waits in.
REAL_COLLECTIVE = """
import torch, torch.distributed
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{os.getcwd()}/store", rank=rank, world_size=2
)
from megatron.base.progress import progress_of_this_process
progress_of_this_process().enter("step", 7, 1.0)
def read_data():
    time.sleep(60)
if rank == 1:
    read_data()
torch.distributed.all_reduce(torch.ones(1))
"""


def test_the_rank_that_a_collective_waits_for_comes_first(tmp_path):
    finished = run(REAL_COLLECTIVE, 2, tmp_path, TEST_LOOK_EVERY_S="0.2")
    assert finished.status == HUNG
    _, _, first, second, _ = report(finished)
    assert first.startswith("---- rank 1 (")
    assert re.search(r"; in \S*user_script.py:\d+ read_data$", first)
    assert second.startswith("---- rank 0 (")
    assert "; waits for others in torch/distributed/distributed_c10d.py:" in second


def test_a_job_with_long_saves_that_is_stopped_as_a_whole_is_left_alone(tmp_path):
    script = f"""{STEPS}
progress.enter(*(("save", 0, 60.0), ("data",))[rank])
time.sleep(1.5)
train(lambda: None, steps=60)
"""
    with launch(script, 2, tmp_path, TEST_LOOK_EVERY_S="0.2") as running:
        wait_for(lambda: (tmp_path / "10.0").exists())
        everything = running.marked()
        for process in everything:
            os.kill(process, signal.SIGSTOP)
        time.sleep(4.0)
        for process in everything:
            os.kill(process, signal.SIGCONT)
        finished = running.finish()
    assert (finished.status, finished.stderr) == (0, "")
