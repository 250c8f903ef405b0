"""A rank that hangs: every node's ranks tell where they are, the job is requeued and goes on."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.cluster_training import TP2_PP2, ClusterTraining
from tests.cluster.events import SubmittedRun
from tests.cluster.recovery import Recovery
from tests.cluster.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.cluster


def test_a_rank_that_is_stopped(
    tmp_path: Path,
    start_cluster: Callable[..., SlurmCluster],
    undisturbed: Callable[..., ClusterTraining],
    note_recovery: Callable[[Recovery], None],
):
    expected = undisturbed()
    keys = TP2_PP2 | {"launcher": "slurm", "deepspeed_slurm": True, "hang_timeout": 15.0}
    training = ClusterTraining(tmp_path / "run", keys)
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
