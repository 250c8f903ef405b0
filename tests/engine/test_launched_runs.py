"""Recorded runs through the real launcher, as a user starts them."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.engine.golden_runs import golden_config, golden_run
from tests.engine.test_neox_runs import start_from_step_0
from tests.engine.training_runs import neox_config, recorded

pytestmark = pytest.mark.launcher

ROOT = Path(__file__).parents[2]


def launched_losses(config: dict[str, object], directory: Path) -> list[float]:
    """Return the losses that ``python deepy.py train.py`` prints, step by step."""
    path = directory / "launched.yml"
    path.write_text(yaml.safe_dump(config | {"log_interval": 1}))
    command = [sys.executable, str(ROOT / "deepy.py"), str(ROOT / "train.py"), str(path)]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if "| lm_loss: " in line]
    return [float(line.split("| lm_loss: ")[1].split(" |")[0]) for line in lines]


@pytest.mark.parametrize("name", ["tp2pp2"])
def test_a_golden_run(name: str, tmp_path: Path):
    losses = launched_losses(golden_config(name, tmp_path), tmp_path)
    assert losses == pytest.approx(golden_run(name)["losses"], rel=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "name", ["pp1", "pp0", "z1", "dp2", "noloss", "llama_gqa", "tied_learned", "bf16", "bf16pp1"]
)
def test_every_golden_run(name: str, tmp_path: Path):
    losses = launched_losses(golden_config(name, tmp_path), tmp_path)
    tolerance = 2e-3 if name.startswith("bf16") else 1e-5
    assert losses == pytest.approx(golden_run(name)["losses"], rel=tolerance)


@pytest.mark.matrix
@pytest.mark.parametrize("run", ["a", "b"])
def test_the_oracles_runs(run: str, tmp_path: Path):
    losses = launched_losses(neox_config(tmp_path, run, **start_from_step_0(run)), tmp_path)
    assert losses == pytest.approx(recorded(run)["losses"], rel=1e-5)
