"""A sample that ends every attempt at one step: the job gives up and names the data."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.cluster_training import TP2_PP2, ClusterTraining
from tests.cluster.events import SubmittedRun
from tests.cluster.slurm_cluster import REPOSITORY, SlurmCluster

pytestmark = pytest.mark.cluster

STEP = 12


def test_a_corrupt_sample_stops_the_job_after_three_tries(
    start_cluster: Callable[..., SlurmCluster],
    undisturbed: Callable[..., ClusterTraining],
    tmp_path: Path,
):
    sample = _sample_of(undisturbed(), STEP)
    document = sample["documents"][-1]
    begin, end = document["bytes"][0]["bytes"]
    cluster = start_cluster(2)
    training = ClusterTraining(
        tmp_path / "run", TP2_PP2 | {"launcher": "slurm", "deepspeed_slurm": True}
    )
    corpus = training.folder / "corpus.bin"
    with corpus.open("r+b") as file:
        file.seek((begin + end) // 4 * 2)  # a token in the middle, of two bytes
        file.write(b"\xff\xff")
    run = SubmittedRun.submit(cluster, training)
    run.wait_for_end(launches=3)
    log = training.log.read_text()
    assert run.job.state == "FAILED", run.report()
    assert run.job.restarts() == 2, run.report()
    assert [attempt.last_step for attempt in training.attempts()] == [STEP - 1] * 3
    verdict = log[log.rindex("neox-slurm: stop:") :]
    assert "3 attempts in a row" in verdict
    assert f"step {STEP}" in verdict
    assert str(sample["position"]) in verdict
    assert str(document["document"]) in verdict
    assert f"{corpus}" in verdict
    assert str(begin) in verdict


def _sample_of(run: ClusterTraining, step: int) -> dict:
    command = [sys.executable, "tools/ledger.py", "step", str(step), "--json", "--run"]
    done = subprocess.run(
        [*command, str(run.save)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)["samples"][1]
