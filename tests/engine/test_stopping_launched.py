"""The real launcher is told to stop: its status, and what goes on from there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron.base.exit_codes import STOPPED
from tests.engine.killed_runs import (
    KilledRun,
    hidden_names,
    loaded_step,
    newest_committed,
    stop_reason,
)

pytestmark = [pytest.mark.distributed, pytest.mark.launcher, pytest.mark.kill]

ROOT = Path(__file__).parents[2]

SLOW_STEPS = """
import runpy, sys, time
from pathlib import Path

from megatron.engine import loop

train_step = loop.train_step


def slow(*arguments):
    Path(__file__).with_name("is training").touch()
    time.sleep(0.2)
    return train_step(*arguments)


loop.train_step = slow
runpy.run_path({train!r}, run_name="__main__")
"""


def launch(script: Path, run: KilledRun) -> subprocess.Popen[str]:
    config = run.folder / "run.yml"
    config.write_text(yaml.safe_dump(run.config))
    command = [sys.executable, str(ROOT / "deepy.py"), str(script), str(config)]
    environ = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)


def await_file(path: Path, launcher: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.05)


@pytest.fixture
def run(tmp_path) -> KilledRun:
    return KilledRun(tmp_path / "run", pipe_parallel_size=2, checkpoint_factor=100, train_iters=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_the_job_is_saved_and_ends_with_75_and_the_same_command_goes_on(number, run):
    script = run.folder / "slow_train.py"
    script.write_text(SLOW_STEPS.format(train=str(ROOT / "train.py")))
    with launch(script, run) as launcher:
        await_file(run.folder / "is training", launcher)
        launcher.send_signal(number)
        _, told = launcher.communicate(timeout=120)
    assert launcher.returncode == STOPPED, told
    assert "Traceback" not in told
    assert stop_reason(run.save) == f"signal {signal.Signals(number).name}"
    saved = newest_committed(run.save)
    assert 1 < saved < 60
    assert hidden_names(run.save) == []
    with launch(ROOT / "train.py", run) as launcher:
        _, told = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, told
    assert loaded_step(run.save) == saved
    assert newest_committed(run.save) == 60


def test_a_signal_while_ranks_import_ends_them_at_once_with_75(run):
    script = run.folder / "importing_train.py"
    script.write_text(
        "from pathlib import Path\n"
        "from megatron.engine.stop_signals import stop_signals\n"
        "stop_signals().begin()\n"
        "Path(__file__).with_name('is importing').touch()\n"
        "import time, torch; time.sleep(60)\n"
    )
    with launch(script, run) as launcher:
        await_file(run.folder / "is importing", launcher)
        time.sleep(0.5)  # for the other rank
        began = time.monotonic()
        launcher.send_signal(signal.SIGUSR1)
        _, told = launcher.communicate(timeout=60)
    assert launcher.returncode == STOPPED, told
    assert "stopped by SIGUSR1 before the first step" in told
    assert time.monotonic() - began < 10
    assert not run.save.exists()
