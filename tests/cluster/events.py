"""What happens to jobs, and how long each takes to go on."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.cluster.cluster_training import SCRIPT, ClusterTraining
from tests.cluster.recovery import Recovery
from tests.cluster.slurm_cluster import Job, SlurmCluster, wait_until

__all__ = ["NOTICED_S", "SubmittedRun"]

STARTED_S = 240.0  # until a launch takes its first step, on a machine with more to do
NOTICED_S = 120.0  # until a job that lost something no longer runs
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@dataclass
class SubmittedRun:
    """A training submitted with the template, and what is done to it."""

    cluster: SlurmCluster
    training: ClusterTraining
    job: Job

    @classmethod
    def submit(
        cls,
        cluster: SlurmCluster,
        training: ClusterTraining,
        *options: str,
        tasks_per_node: int | None = 2,
        **environ: str,
    ) -> "SubmittedRun":
        """Submit ``tools/slurm/train.sbatch``, on two nodes if ``options`` don't say otherwise."""
        usual = ["--nodes=2", "--gpus-per-node=0", "--time=0"]
        if tasks_per_node is not None:
            usual.append(f"--ntasks-per-node={tasks_per_node}")
        job = cluster.submit(
            "tools/slurm/train.sbatch",
            str(training.config_path),
            options=[*usual, f"--output={training.log}", *options],
            NEOX_SCRIPT=str(SCRIPT),
            **environ,
        )
        return cls(cluster, training, job)

    def wait_for_step(self, step: int) -> None:
        """Return once the newest launch has recorded ``step``."""
        self._wait(lambda: self.training.last_step() >= step, f"step {step}", STARTED_S)

    def wait_for_new_steps(self, number: int, *, after: int = 0) -> None:
        """Return once a launch after attempt ``after`` has recorded so many steps."""

        def has_steps() -> bool:
            newest = self.training.attempts()[-1:]
            return bool(newest) and newest[0].number > after and len(newest[0].steps) >= number

        self._wait(has_steps, f"{number} steps of a launch after attempt {after}", STARTED_S)

    def recover(self, event: str, happen: Callable[[], None]) -> Recovery:
        """Let something happen that stops the job; return once the next launch takes steps."""
        newest = self.training.attempts()[-1].number
        began = time.time()
        restarts = self.job.restarts()
        happen()
        stopped, runs = self.wait_for_restart(event, restarts)
        self.wait_for_new_steps(1, after=newest)
        attempts = self.training.attempts
        self._wait(lambda: attempts()[-1].startup_s, "start-up times in the record", STARTED_S)
        before, after = self.training.attempts()[-2:]
        startup_s = after.startup_s
        phases = list(startup_s)
        until_record = sum(startup_s[name] for name in phases[: phases.index("record") + 1])
        return Recovery(
            event,
            stopping_s=stopped - began,
            waiting_s=runs - stopped,
            starting_s=after.facts["started"] - until_record - runs,
            startup_s=startup_s,
            repeated_steps=max(0, before.last_step - after.loaded_step),
        )

    def wait_for_restart(self, event: str, restarts: int) -> tuple[float, float]:
        """Return when the job no longer ran, and when it ran again."""
        stopped = self._wait(
            lambda: self._has_stopped(restarts), f"the job's end after: {event}", NOTICED_S
        )
        runs = self._wait(
            lambda: self.job.is_running(restarts=restarts + 1),
            f"the job's next start after: {event}",
            NOTICED_S,
        )
        return stopped, runs

    def wait_for_end(self, *, launches: int = 1) -> None:
        """Let the training run as fast as it can; return once its job is over.

        Args:
            launches: that may take place until then.
        """
        self.training.pause(0.0)
        self._wait(self._is_over, "the job's end", launches * STARTED_S)

    def assert_completed(self) -> None:
        """Require that the job ended well."""
        assert self.job.state == "COMPLETED", self.report()

    def kill_rank(self, rank: int) -> None:
        """SIGKILL one rank."""
        os.kill(self.ranks()[rank], signal.SIGKILL)

    def ranks(self) -> dict[int, int]:
        """Return the processes of the newest launch's ranks, as this machine counts them."""
        launch = self.training.attempts()[-1].facts["environment"]["launch"]
        return self.cluster.ranks_of(launch, str(SCRIPT))

    def preempt(self, *, nodes: int = 2, for_s: float = 3.0) -> None:
        """Run a job of the higher partition on the nodes that this one has."""
        names = ",".join(self.job.nodes())
        options = (f"--nodelist={names}", f"--nodes={nodes}", "--exclusive", "--partition=high")
        output = f"--output={self.training.folder}/preemptor.log"
        wrapped = f"--wrap=sleep {for_s}"
        self.cluster.on("head", "sbatch", *options, output, wrapped)

    def report(self) -> str:
        """Return what helps to understand a failure."""
        attempts = "\n".join(
            f"attempt {one.number}: from {one.loaded_step}, {len(one.steps)} steps to "
            f"{one.last_step}, saved {one.saved_step}, {one.stop_reason}"
            for one in self.training.attempts()
        )
        facts = self.job.facts()
        shown = " ".join(
            f"{name}={facts.get(name)}"
            for name in ("JobState", "Reason", "Restarts", "ExitCode", "NodeList")
        )
        return "\n".join([shown, attempts, self.training.tail(), self.cluster.logs()])

    def _has_stopped(self, restarts: int) -> bool:
        facts = self.job.facts()
        if not facts:
            return False
        return facts["JobState"] != "RUNNING" or int(facts["Restarts"]) > restarts

    def _is_over(self) -> bool:
        return self.job.state in _OVER

    def _wait(self, condition: Callable[[], object], what: str, timeout_s: float) -> float:
        return wait_until(
            condition,
            what,
            timeout_s=timeout_s,
            is_hopeless=self._is_over,
            otherwise=self.report,
        )
