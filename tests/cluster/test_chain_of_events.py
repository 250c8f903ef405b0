"""Twenty random events in one run, some of them while it is still starting."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.cluster_training import TP2_PP2, ClusterTraining
from tests.cluster.events import SubmittedRun
from tests.cluster.slurm_cluster import SlurmCluster, wait_until

pytestmark = pytest.mark.cluster

EVENTS = int(os.environ.get("CHAIN_EVENTS", "20"))
SEED = int(os.environ.get("CHAIN_SEED", "6"))
STEPS_PER_EVENT = 6
CONTROLLER = "slurmctld restart"


class Chain:
    """Draws events, and knows what each does to the job."""

    def __init__(self, cluster: SlurmCluster, run: SubmittedRun, seed: int) -> None:
        self.cluster = cluster
        self.run = run
        self.random = random.Random(seed)
        self._repair: Callable[[], None] = lambda: None

    def next(self, *, is_starting: bool) -> str:
        """Let a random event happen; return once the job runs again.

        Args:
            is_starting: it hits a launch that has taken no step yet.
        """
        events = {
            "scontrol requeue": self._requeue,
            "preemption": self.run.preempt,
            "power loss": self._power_loss,
            "network cut": self._network_cut,
            "scancel --signal=TERM": self._cancel,
        }
        if not is_starting:
            events["SIGKILL of a rank"] = lambda: self.run.kill_rank(self.random.randrange(4))
            events[CONTROLLER] = self.cluster.restart_controller
        name = self.random.choice(sorted(events))
        restarts = self.run.job.restarts()
        before = self.run.training.last_step()
        events[name]()
        if name == CONTROLLER:
            self.run.wait_for_step(before + 2)
        else:
            self.run.wait_for_restart(name, restarts)
        self._repair()
        self._repair = lambda: None
        return name

    def _requeue(self) -> None:
        self.cluster.on("head", "scontrol", "requeue", str(self.run.job.number))

    def _cancel(self) -> None:
        self.cluster.on("head", "scancel", "--signal=TERM", str(self.run.job.number))

    def _power_loss(self) -> None:
        node = self.random.choice(self.run.job.nodes())
        self.cluster.power_off(node)
        self._repair = lambda: self.cluster.power_on(node)

    def _network_cut(self) -> None:
        node = self.random.choice(self.run.job.nodes())
        self.cluster.cut(node)
        self._repair = lambda: self.cluster.heal(node)


def test_twenty_random_events(
    start_cluster: Callable[..., SlurmCluster],
    undisturbed: Callable[..., ClusterTraining],
    tmp_path: Path,
):
    sizes = {"train_iters": EVENTS * STEPS_PER_EVENT, "checkpoint_factor": 4}
    expected = undisturbed(**sizes)
    cluster = start_cluster(4)
    keys = TP2_PP2 | {"launcher": "slurm", "deepspeed_slurm": True} | sizes
    training = ClusterTraining(tmp_path / "run", keys)
    training.pause(0.5)
    run = SubmittedRun.submit(cluster, training)
    chain = Chain(cluster, run, SEED)
    began, starting_before, newest = time.monotonic(), False, 0
    for number in range(1, EVENTS + 1):
        # A launch hit as it starts makes no progress; not twice in a row, which nobody could tell
        # from a run that can't.
        starting = not starting_before and chain.random.random() < 0.4 and number > 1
        if starting:
            time.sleep(chain.random.uniform(0, 20))
        else:
            run.wait_for_new_steps(1, after=newest)
            time.sleep(chain.random.uniform(0, 2))
        starting_before = starting
        step = training.last_step()
        known = max((attempt.number for attempt in training.attempts()), default=0)
        name = chain.next(is_starting=starting)
        if name != CONTROLLER:  # of which the job notices nothing
            newest = known
        seconds = time.monotonic() - began
        print(f"{number:2d} {seconds:5.0f} s, step {step}: {name}", flush=True)
        wait_until(
            lambda: len(cluster.idle_nodes()) >= 1,
            "a spare node",
            timeout_s=60,
            otherwise=run.report,
        )
    run.wait_for_end()
    run.assert_completed()
    training.assert_whole(expected)
    print(
        f"{EVENTS} events, {len(training.attempts())} attempts that took steps or began to, "
        f"{training.repeated_steps()} steps done again"
    )
