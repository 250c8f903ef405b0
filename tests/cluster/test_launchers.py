"""Launches over two nodes without SLURM: started on the first, told to stop, started again."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster_training import SCRIPT, TP2_PP2, ClusterTraining
from tests.cluster.slurm_cluster import SlurmCluster, wait_until

pytestmark = pytest.mark.cluster

STOPPED = 75


class Launch:
    """``python deepy.py`` on node1."""

    def __init__(self, cluster: SlurmCluster, training: ClusterTraining) -> None:
        self.cluster = cluster
        self.training = training
        self._pid = training.folder / "launcher.pid"

    @contextlib.contextmanager
    def running(self) -> Iterator[Callable[[], int]]:
        """Start it; what is given waits for its end and returns its exit status."""
        self._pid.unlink(missing_ok=True)
        launch = f'exec "$PYTHON" deepy.py {SCRIPT} {self.training.config_path}'
        shell = ("sh", "-c", f"echo $$ >{self._pid}; {launch}")
        # Debian's mpirun refuses to be root otherwise.
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        with self.cluster.started("node1", *shell, log=self.training.log, **root) as process:
            self._process = process
            yield lambda: process.wait(120)

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def signal(self, name: str) -> None:
        self.cluster.on("node1", "kill", "-s", name, self._pid.read_text().strip())


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_training_over_two_nodes_stops_and_resumes(
    start_cluster: Callable[..., SlurmCluster],
    undisturbed: Callable[..., ClusterTraining],
    tmp_path: Path,
    launcher: str,
):
    expected = undisturbed()
    cluster = start_cluster(2)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=2\nnode2 slots=2\n")
    keys = TP2_PP2 | {"hostfile": str(hostfile), "launcher": launcher}
    training = ClusterTraining(tmp_path / "run", keys)
    training.pause(0.3)
    launch = Launch(cluster, training)
    with launch.running() as end:
        wait_until(
            lambda: training.last_step() >= 7,
            "step 7",
            timeout_s=240,
            is_hopeless=launch.is_over,
            otherwise=training.tail,
        )
        launch.signal("TERM")
        assert end() == STOPPED, training.tail()
    stopped = training.attempts()[-1]
    assert stopped.stop_reason == "signal SIGTERM"
    assert not cluster.ranks_of(stopped.facts["environment"]["launch"], str(SCRIPT))
    training.pause(0.0)
    with launch.running() as end:
        assert end() == 0, training.tail()
    assert training.attempts()[-1].loaded_step == stopped.last_step
    training.assert_whole(expected)
