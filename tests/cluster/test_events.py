"""What SLURM and its machines do to jobs: each time the run goes on exactly where it was."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.cluster_training import TP2_PP2, ClusterTraining
from tests.cluster.events import SubmittedRun
from tests.cluster.recovery import Recovery
from tests.cluster.slurm_cluster import SlurmCluster, wait_until

pytestmark = pytest.mark.cluster

StartCluster = Callable[..., SlurmCluster]
Note = Callable[[Recovery], None]

SLURM = TP2_PP2 | {"launcher": "slurm", "deepspeed_slurm": True}


class Disturbed:
    """A run that is hit after step 12, between the saves after steps 10 and 15."""

    def __init__(
        self, tmp_path: Path, undisturbed: Callable[..., ClusterTraining], note: Note
    ) -> None:
        self.training = ClusterTraining(tmp_path / "run", SLURM)
        self._undisturbed = undisturbed()
        self._note = note

    def submit(self, cluster: SlurmCluster, *options: str, pause_s: float = 0.4) -> SubmittedRun:
        self.training.pause(pause_s)
        run = SubmittedRun.submit(cluster, self.training, *options)
        run.wait_for_step(12)
        return run

    def finish(self, run: SubmittedRun, recovery: Recovery | None = None) -> None:
        if recovery is not None:
            self._note(recovery)
        run.wait_for_end()
        run.assert_completed()
        self.training.assert_whole(self._undisturbed)


@pytest.fixture
def disturbed(
    tmp_path: Path, undisturbed: Callable[..., ClusterTraining], note_recovery: Note
) -> Disturbed:
    return Disturbed(tmp_path, undisturbed, note_recovery)


def test_scontrol_requeue(start_cluster: StartCluster, disturbed: Disturbed):
    cluster = start_cluster(2)
    run = disturbed.submit(cluster)
    recovery = run.recover("scontrol requeue", lambda: _scontrol_requeue(cluster, run))
    disturbed.finish(run, recovery)


def _scontrol_requeue(cluster: SlurmCluster, run: SubmittedRun) -> None:
    cluster.on("head", "scontrol", "requeue", str(run.job.number))


@pytest.mark.parametrize("told", ["steps", "batch"])
def test_preemption_by_a_higher_partition(
    start_cluster: StartCluster, disturbed: Disturbed, told: str
):
    # By default SLURM tells a preempted job's steps; with preempt_send_user_signal its batch shell.
    cluster = start_cluster(2, TESTBED_PREEMPT=told)
    run = disturbed.submit(cluster)
    recovery = run.recover(f"preemption, {told} told", run.preempt)
    assert recovery.repeated_steps == 0, run.report()
    disturbed.finish(run, recovery)


def test_time_limit(start_cluster: StartCluster, disturbed: Disturbed):
    cluster = start_cluster(2)
    # The signal comes about 75 s after the start; until then there are steps to do.
    run = disturbed.submit(cluster, "--time=2", "--signal=B:USR1@45", pause_s=2.0)
    recovery = run.recover("time limit", lambda: None)
    assert recovery.repeated_steps == 0, run.report()
    disturbed.finish(run, recovery)


def test_power_loss_of_a_node(start_cluster: StartCluster, disturbed: Disturbed):
    cluster = start_cluster(3)
    run = disturbed.submit(cluster)
    lost = run.job.nodes()[1]
    recovery = run.recover("power loss of a node", lambda: cluster.power_off(lost))
    assert lost not in run.job.nodes()
    disturbed.finish(run, recovery)


def test_power_loss_of_the_batch_node(start_cluster: StartCluster, disturbed: Disturbed):
    cluster = start_cluster(3)
    run = disturbed.submit(cluster)
    lost = run.job.nodes()[0]
    recovery = run.recover("power loss of the batch node", lambda: cluster.power_off(lost))
    assert lost not in run.job.nodes()
    disturbed.finish(run, recovery)


def test_network_cut_of_a_node(start_cluster: StartCluster, disturbed: Disturbed):
    cluster = start_cluster(3)
    run = disturbed.submit(cluster)
    lost = run.job.nodes()[1]
    ranks = run.ranks()
    assert len(ranks) == 4
    recovery = run.recover("network cut of a node", lambda: cluster.cut(lost))
    assert lost not in run.job.nodes()
    # Those of the node that can't be reached don't live on.
    wait_until(
        lambda: not any(Path(f"/proc/{process}").exists() for process in ranks.values()),
        "the end of the first launch's ranks",
        timeout_s=60,
    )
    disturbed.finish(run, recovery)


def test_scancel_with_a_signal(start_cluster: StartCluster, disturbed: Disturbed):
    cluster = start_cluster(2)
    run = disturbed.submit(cluster)
    recovery = run.recover(
        "scancel --signal=TERM",
        lambda: cluster.on("head", "scancel", "--signal=TERM", str(run.job.number)),
    )
    assert recovery.repeated_steps == 0, run.report()
    disturbed.finish(run, recovery)


def test_death_of_one_rank(start_cluster: StartCluster, disturbed: Disturbed):
    cluster = start_cluster(2)
    run = disturbed.submit(cluster)
    recovery = run.recover("SIGKILL of one rank", lambda: run.kill_rank(3))
    assert recovery.stopping_s < 60
    disturbed.finish(run, recovery)


def test_restart_of_the_controller(start_cluster: StartCluster, disturbed: Disturbed):
    cluster = start_cluster(2)
    run = disturbed.submit(cluster)
    # Before its first periodic save it would come back believing that the job hasn't started.
    time.sleep(10)
    cluster.restart_controller()
    run.wait_for_step(18)
    disturbed.finish(run)
    assert len(disturbed.training.attempts()) == 1
