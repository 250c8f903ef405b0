"""A training that hangs is ended, says who held it up, and where the same command goes on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron.base.exit_codes import HUNG
from megatron.ledger.attempt_facts import read_attempt_facts
from tests.engine.training_runs import neox_config

pytestmark = pytest.mark.launcher

ROOT = Path(__file__).parents[2]


def launched(script: str, config: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a script of ours as users run train.py."""
    return subprocess.run(
        [sys.executable, str(ROOT / "deepy.py"), str(ROOT / script), str(config)],
        cwd=config.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_hang_is_ended_and_noted(tmp_path: Path):
    save = tmp_path / "run"
    keys = {"save": str(save), "load": str(save), "hang_timeout": 8.0, "train_iters": 8}
    keys |= {"pipe_parallel_size": 1, "model_parallel_size": 1, "num_gpus": 2}
    keys |= {"train_batch_size": 8, "gradient_accumulation_steps": 1, "log_interval": 1}
    keys |= {"checkpoint_factor": 3, "eval_interval": 2, "eval_iters": 1}
    keys |= {"train_micro_batch_size_per_gpu": 4}
    config = tmp_path / "hang.yml"
    config.write_text(yaml.safe_dump(neox_config(tmp_path, **keys)))

    hung = launched("tests/engine/hanging_train.py", config, HANGS="1 5")
    assert hung.returncode == HUNG, hung.stderr[-3000:]
    lines = hung.stderr.splitlines()
    first, second, end, next_launch = lines[-4:]
    assert re.search(r"^---- rank 1 \(.*: step 5 for .*, limit 8.0 s; in .* get_stuck$", first)
    assert re.search(r"^---- rank 0 \(.*: step 5 for .*, limit 8.0 s; waits for others", second)
    assert end == f"---- the job ends with status {HUNG}"
    assert next_launch == (
        "deepy: the same command goes on from global_step3; step 4 will be done again, with "
        "the same samples"
    )
    for rank in (0, 1):
        assert any(line.startswith(f"[rank{rank}]: Current thread 0x") for line in lines)
    stop = read_attempt_facts(save, 1).stop
    assert stop.reason.startswith("hung: rank ")
    assert (stop.step, stop.done_step) == (4, 4)
