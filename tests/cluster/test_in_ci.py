"""The two commonest events, in every run of the test suite: a requeue, and the loss of a node."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.cluster_training import TP2_PP2, ClusterTraining
from tests.cluster.events import SubmittedRun
from tests.cluster.recovery import Recovery
from tests.cluster.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.cluster_ci


def test_a_requeue_and_a_lost_node_in_one_run(
    start_cluster: Callable[..., SlurmCluster],
    undisturbed: Callable[..., ClusterTraining],
    note_recovery: Callable[[Recovery], None],
    tmp_path: Path,
):
    expected = undisturbed()
    cluster = start_cluster(3)
    keys = TP2_PP2 | {"launcher": "slurm", "deepspeed_slurm": True}
    training = ClusterTraining(tmp_path / "run", keys)
    training.pause(0.2)
    run = SubmittedRun.submit(cluster, training)
    run.wait_for_step(7)
    requeue = ("scontrol", "requeue", str(run.job.number))
    note_recovery(run.recover("scontrol requeue", lambda: cluster.on("head", *requeue)))
    lost = run.job.nodes()[1]
    note_recovery(run.recover("power loss of a node", lambda: cluster.power_off(lost)))
    assert lost not in run.job.nodes()
    run.wait_for_end()
    run.assert_completed()
    training.assert_whole(expected)
    jobs = [attempt.facts["environment"]["job"] for attempt in training.attempts()]
    assert [job["SLURM_JOB_ID"] for job in jobs] == [str(run.job.number)] * 3
    assert [int(job.get("SLURM_RESTART_COUNT", 0)) for job in jobs] == [0, 1, 2]
    assert [job["SLURM_JOB_NODELIST"] for job in jobs] == ["node[1-2]", "node[1-2]", "node[1,3]"]
