"""A rank that hangs: every node's ranks tell where they are, the job is requeued and goes on.

A job that SLURM suspends doesn't hang.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.cluster_training import TP2_PP2, ClusterTraining
from tests.cluster.events import SubmittedRun
from tests.cluster.recovery import Recovery
from tests.cluster.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.cluster


SLURM = TP2_PP2 | {"launcher": "slurm", "deepspeed_slurm": True, "hang_timeout": 15.0}
SUSPENDED_S = 40.0  # longer than a step may take, and than a node may be silent


def test_a_rank_that_is_stopped(
    tmp_path: Path,
    start_cluster: Callable[..., SlurmCluster],
    undisturbed: Callable[..., ClusterTraining],
    note_recovery: Callable[[Recovery], None],
):
    expected = undisturbed()
    training = ClusterTraining(tmp_path / "run", SLURM)
    training.pause(0.4)
    cluster = start_cluster(2)
    run = SubmittedRun.submit(cluster, training)
    run.wait_for_step(12)
    stopped = run.ranks()[2]
    note_recovery(run.recover("a rank that hangs (15 s)", lambda: os.kill(stopped, signal.SIGSTOP)))
    text = training.log.read_text()
    told = "\n".join(line for line in text.splitlines() if line.startswith(("---- ", "deepy: ")))
    for rank in range(4):
        assert re.search(rf"\[rank{rank}\]: (Current t|T)hread 0x", text), told
    looks_at = (
        r"---- of 4 ranks the one to look at first:\n---- rank 2 \(node2, .*; it is stopped; "
    )
    assert re.search(looks_at, told), told
    assert "---- the job ends with status 76\n" in told
    assert "deepy: the same command goes on from global_step" in told
    # Asked for its stacks, the rank went on, and so all of them could save, if there was time.
    assert training.attempts()[0].stop_reason.startswith(("signal SIGTERM", "hung: rank 2 (node2"))
    run.wait_for_end()
    run.assert_completed()
    training.assert_whole(expected)


def test_a_job_that_is_suspended_goes_on(
    tmp_path: Path,
    start_cluster: Callable[..., SlurmCluster],
    undisturbed: Callable[..., ClusterTraining],
):
    expected = undisturbed()
    training = ClusterTraining(tmp_path / "run", SLURM)
    training.pause(0.4)
    cluster = start_cluster(2)
    run = SubmittedRun.submit(cluster, training)
    run.wait_for_step(12)
    cluster.on("head", "scontrol", "suspend", str(run.job.number))
    time.sleep(SUSPENDED_S)
    assert training.last_step() < 30, "it wasn't suspended"
    cluster.on("head", "scontrol", "resume", str(run.job.number))
    run.wait_for_end()
    run.assert_completed()
    assert len(training.attempts()) == 1
    training.assert_whole(expected)
