"""A launch tells how long it took to its first step, and what took it."""

import subprocess
import sys

import pytest

from megatron.ledger.attempt_facts import read_attempt_facts
from tests.engine.training_runs import neox_config, run_training

PHASES = ["start", "connect", "verify", "data", "model", "load", "engine", "record", "first step"]


@pytest.mark.distributed
def test_a_launch_records_how_long_each_phase_before_its_first_step_took(tmp_path):
    run = {"save": str(tmp_path / "run"), "checkpoint_factor": 2, "train_iters": 2, "eval_iters": 0}
    config = neox_config(tmp_path, **run)
    trained = run_training(config, tmp_path)
    facts = read_attempt_facts(tmp_path / "run", 1)
    assert list(facts.startup_s) == PHASES
    assert facts.startup_s["first step"] >= trained.records[0].seconds - 0.001
    [line] = [line for line in trained.printed.splitlines() if "start-up took" in line]
    assert line.startswith(f"start-up took {sum(facts.startup_s.values()):.1f} s: start 0.0, conn")


def test_imports_count_from_the_start_of_the_process():
    program = (
        "import time; time.sleep(0.3)\n"
        "from megatron.base.startup import StartUp\n"
        "startup = StartUp.of_this_process(); startup.enter('rest'); startup.finish()\n"
        "print(startup.seconds['imports'], startup.seconds['rest'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    imports, rest = map(float, result.stdout.split())
    assert 0.3 <= imports < 30
    assert rest < 0.3
