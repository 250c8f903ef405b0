"""Nodes with disks of their own: data may lie there, `save` may not."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.cluster_training import ClusterTraining
from tests.cluster.slurm_cluster import SlurmCluster
from tests.cluster.test_launchers import Launch

pytestmark = pytest.mark.cluster

CANNOT_LAUNCH = 2
SEPARATE = {"pipe_parallel_size": 1, "model_parallel_size": 1, "use_shared_fs": False}


def own_disk(cluster: SlurmCluster, node: str, place: Path) -> None:
    """Give a node a directory that no other node sees."""
    place.mkdir(exist_ok=True)
    cluster.on(node, "mount", "-t", "tmpfs", "tmpfs", str(place))


def training_over_two_nodes(tmp_path: Path, **keys: object) -> ClusterTraining:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=2\nnode2 slots=2\n")
    places = {"hostfile": str(hostfile), "launcher": "pdsh", "train_iters": 10}
    return ClusterTraining(tmp_path / "run", SEPARATE | places | keys)


def status_of(launch: Launch) -> int:
    with launch.running() as end:
        return end()


def test_a_save_that_one_node_has_to_itself_is_refused_by_name(
    start_cluster: Callable[..., SlurmCluster], tmp_path: Path
):
    cluster = start_cluster(2)
    training = training_over_two_nodes(tmp_path)
    own_disk(cluster, "node2", training.save)
    assert status_of(Launch(cluster, training)) == CANNOT_LAUNCH, training.tail()
    message = (
        f"save: {training.save} must be one directory that every node reads and writes, but rank 2 "
        "on node2 does not see what rank 0 wrote there"
    )
    assert message in training.log.read_text(), training.tail()
    assert not list(training.save.glob("global_step*"))
    assert not list(training.save.glob(".probe*"))


def test_every_node_builds_index_maps_beside_data_of_its_own(
    start_cluster: Callable[..., SlurmCluster], tmp_path: Path
):
    cluster = start_cluster(2)
    data = tmp_path / "data"
    lists = {f"{split}_data_paths": [str(data / "corpus")] for split in ("train", "valid", "test")}
    training = training_over_two_nodes(tmp_path, **lists, data_path=None)
    for node in ("node1", "node2"):
        own_disk(cluster, node, data)
        cluster.on(node, "cp", *map(str, training.folder.glob("corpus.*")), str(data))
    launch = Launch(cluster, training)

    cluster.on("node2", "sh", "-c", f"printf x | dd of={data}/corpus.bin conv=notrunc seek=99 bs=1")
    assert status_of(launch) == CANNOT_LAUNCH, training.tail()
    assert "node2 has other data than the node of rank 0" in training.log.read_text()

    cluster.on("node2", "cp", str(training.folder / "corpus.bin"), str(data))
    assert status_of(launch) == 0, training.tail()
    maps = [
        cluster.on(node, "sh", "-c", f"cd {data} && sha256sum *.npy") for node in ("node1", "node2")
    ]
    assert maps[0] == maps[1]
    assert maps[0].count("_shuffle_idx.npy") == 3
    assert not list(data.iterdir())  # elsewhere nothing is seen of it
    verify = (sys.executable, "tools/ledger.py", "verify", "--all", "--run", str(training.save))
    assert "everything agrees" in cluster.on("node1", *verify)
