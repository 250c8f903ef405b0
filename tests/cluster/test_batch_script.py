"""tools/slurm/train.sbatch on a real SLURM; launches are played, so that only the script is new."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.ledger.launches_file import read_launches
from tests.cluster.slurm_cluster import REPOSITORY, Job, SlurmCluster, wait_until
from tests.ledger.queries.simulated_run import write_corpus

pytestmark = pytest.mark.cluster

SCRIPT = str(REPOSITORY / "tools/slurm/train.sbatch")


class Played:
    """A folder with a played deepy.py, and jobs that launch it there."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        folder.mkdir()
        shutil.copy(REPOSITORY / "tests/cluster/played_deepy.py", folder / "deepy.py")
        self.corpus = write_corpus(folder / "corpus")

    def config(self, name: str, *, play: str = "train") -> Path:
        """Write a configuration of a run of its own; return its save."""
        save = self.folder / f"save-{name}"
        keys = {"save": str(save), "train_iters": 20, "corpus": self.corpus, "play": play}
        (self.folder / f"{name}.yml").write_text(json.dumps(keys))
        return save

    def submit(self, config: str, *options: str, **environ: str) -> Job:
        """Submit a job on one node; its log is called by its number."""
        one_node = ["--nodes=1", "--gpus-per-node=1", "--time=10", "--output=%j.log"]
        return self.cluster.submit(
            SCRIPT,
            config,
            options=[f"--chdir={self.folder}", *one_node, *options],
            PYTHONPATH=str(REPOSITORY),
            **environ,
        )

    def log(self, name: object) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        def logs() -> str:
            texts = [f"--- {one.name}\n{one.read_text()}" for one in self.folder.glob("*.log")]
            return "\n".join([*texts, self.cluster.logs()])

        wait_until(condition, what, timeout_s=120, otherwise=logs)


@pytest.fixture
def played(start_cluster, tmp_path):
    return Played(start_cluster(3), tmp_path / "played")


def actions(save: Path) -> list[tuple[str | None, int, str]]:
    return [(one.job, one.status, one.action) for one in read_launches(save)]


def test_a_task_of_an_array_requeues_itself_and_no_other(played):
    saves = {task: played.config(f"task-{task}") for task in (1, 2)}
    array = played.submit("task-%a.yml", "--array=1-2", "--output=task-%a.log")
    for task in (1, 2):
        played.wait_for(lambda task=task: "waiting" in played.log(f"task-{task}"), "both run")
    # the last task has the array's own number: requeueing that number would restart both
    numbers = dict(
        line.split()
        for line in played.cluster.on("head", "squeue", "-h", "-o", "%K %A").splitlines()
    )
    last = next(task for task, number in numbers.items() if number == str(array.number))
    name = f"{array.number}_{last}"
    played.cluster.on("head", "scancel", "--batch", "--signal=USR1", name)
    played.wait_for(lambda: "run is finished" in played.log(f"task-{last}"), "the last task ends")
    other = "1" if last == "2" else "2"
    assert played.log(f"task-{other}").count("launch 0 of job") == 1
    assert "launch 1 of job" not in played.log(f"task-{other}")
    assert [one[1:] for one in actions(saves[int(last)])] == [(75, "requeue"), (0, "done")]
    played.cluster.on("head", "scancel", str(array.number))


def test_a_cancelled_job_saves_and_does_not_come_back(played):
    save = played.config("a")
    job = played.submit("a.yml")
    played.wait_for(lambda: "waiting" in played.log(job.number), "it runs")
    played.cluster.on("head", "scancel", str(job.number))
    played.wait_for(lambda: "SLURM is ending this job" in played.log(job.number), "it ends")
    played.wait_for(lambda: job.state == "CANCELLED", "it is cancelled")
    assert "stopped by SIGTERM" in played.log(job.number)
    assert [one[1:] for one in actions(save)] == [(75, "requeue")]
    again = played.submit("a.yml")
    played.wait_for(lambda: again.state == "COMPLETED", "a new submission finishes the run")


def test_a_job_is_requeued_when_the_controller_is_back(played):
    played.config("a")
    job = played.submit("a.yml")
    played.wait_for(lambda: "waiting" in played.log(job.number), "it runs")
    # slurmctld writes down every few seconds what has changed; it shall know that the job runs
    known = played.cluster.state / "head" / "spool" / "job_state"
    changed = time.time()
    played.cluster.on("head", "scontrol", "update", f"JobId={job.number}", "Comment=runs")
    played.wait_for(lambda: known.stat().st_mtime > changed, "slurmctld saves its state")
    played.cluster.on("head", "scancel", "--batch", "--signal=USR1", str(job.number))
    played.cluster.restart_controller(down_s=8.0)
    played.wait_for(lambda: "run is finished" in played.log(job.number), "it goes on")
    assert job.restarts() == 1


def test_links_of_a_chain_go_on_and_the_rest_end_at_once(played):
    save = played.config("a")
    options: list[str] = []
    links = []
    for _ in range(3):
        links.append(played.submit("a.yml", *options, NEOX_REQUEUE="no"))
        options = [f"--dependency=afterany:{links[-1].number}"]
    first, second, third = links
    played.wait_for(lambda: "waiting" in played.log(first.number), "the first link runs")
    played.cluster.on("head", "scancel", "--batch", "--signal=USR1", str(first.number))
    played.wait_for(lambda: third.state == "COMPLETED", "the last link ends")
    assert [job.state for job in links] == ["FAILED", "COMPLETED", "COMPLETED"]
    assert first.facts()["ExitCode"] == "75:0"
    assert actions(save) == [
        (str(first.number), 75, "requeue"),
        (str(second.number), 0, "done"),
    ]
    assert "done: the run is finished: step 20" in played.log(third.number)


def test_links_that_wait_when_a_run_is_given_up_do_not_try(played):
    save = played.config("a", play="die")
    options: list[str] = []
    links = []
    for _ in range(3):
        links.append(played.submit("a.yml", *options, NEOX_REQUEUE="no", NEOX_TRIES="2"))
        options = [f"--dependency=afterany:{links[-1].number}"]
    played.wait_for(lambda: links[-1].state == "FAILED", "the last link ends")
    assert [action for _, _, action in actions(save)] == ["requeue", "stop"]
    assert "step 8 reads positions 56..63" in played.log(links[1].number)
    assert f"job {links[1].number}, before this one, has stopped" in played.log(links[2].number)
    later = played.submit("a.yml", NEOX_REQUEUE="no", NEOX_TRIES="2")
    played.wait_for(lambda: later.state == "FAILED", "a later submission tries again")
    assert actions(save)[-1] == (str(later.number), 1, "requeue")


def test_a_job_that_lost_a_node_waits_until_slurm_knows_of_it(played):
    """SLURM would give the dead node again: here it takes minutes to notice, as it does usually."""
    settings = played.cluster.state / "etc/slurm/slurm.conf"
    text = settings.read_text()
    settings.write_text(text.replace("SlurmdTimeout=10", "SlurmdTimeout=60"))
    assert settings.read_text() != text
    played.cluster.on("head", "scontrol", "reconfigure")
    save = played.config("a", play="lose")
    job = played.submit("a.yml", "--nodes=2")
    played.wait_for(lambda: "waiting" in played.log(job.number), "it runs")
    assert job.nodes() == ["node1", "node2"]
    played.cluster.power_off("node2")
    (played.folder / "lost").touch()
    played.wait_for(lambda: "doesn't answer" in played.log(job.number), "the script notices")
    played.wait_for(lambda: "requeued" in played.log(job.number), "SLURM notices")
    played.wait_for(lambda: "run is finished" in played.log(job.number), "it goes on")
    assert job.nodes() == ["node1", "node3"]
    assert [one[1:] for one in actions(save)] == [(77, "requeue"), (0, "done")]
