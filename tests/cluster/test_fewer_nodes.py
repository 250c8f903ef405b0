"""A run that loses a node goes on with those that are left, and takes the node back later."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.cluster_training import ClusterTraining
from tests.cluster.events import SubmittedRun
from tests.cluster.recovery import Recovery
from tests.cluster.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.cluster


def test_four_nodes_then_three_then_four(
    start_cluster: Callable[..., SlurmCluster],
    undisturbed: Callable[..., ClusterTraining],
    note_recovery: Callable[[Recovery], None],
    tmp_path: Path,
):
    keys = {
        "pipe_parallel_size": 1,
        "model_parallel_size": 1,
        "elastic_batch": True,
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": None,
        "train_iters": 36,
    }
    expected = undisturbed(**keys, num_gpus=1)
    cluster = start_cluster(4)
    training = ClusterTraining(
        tmp_path / "run", keys | {"launcher": "slurm", "deepspeed_slurm": True, "num_gpus": 1}
    )
    training.pause(0.4)
    # With --ntasks-per-node=1 SLURM takes the smaller number, though the larger is free.
    run = SubmittedRun.submit(cluster, training, "--nodes=3-4", tasks_per_node=None)
    run.wait_for_step(7)
    assert len(run.job.nodes()) == 4
    note_recovery(run.recover("4 nodes -> 3", lambda: cluster.power_off("node4")))
    assert run.job.nodes() == ["node1", "node2", "node3"]
    cluster.power_on("node4")
    run.wait_for_new_steps(3)
    requeue = ("scontrol", "requeue", str(run.job.number))
    note_recovery(run.recover("3 nodes -> 4", lambda: cluster.on("head", *requeue)))
    assert len(run.job.nodes()) == 4
    run.wait_for_end()
    run.assert_completed()
    training.assert_whole()
    sizes = [one.facts["topology"]["data_parallel_size"] for one in training.attempts()]
    assert sizes == [4, 3, 4]
    samples = {step: numbers[:3] for step, numbers in training.lineage().items()}
    assert samples == {step: numbers[:3] for step, numbers in expected.lineage().items()}
