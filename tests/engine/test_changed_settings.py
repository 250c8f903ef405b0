"""A run that goes on with other settings of its model says so; the same ones are called equal."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.cli.resume_plan import plan_launch
from megatron.config.load import load_config
from tests.engine.training_runs import neox_config, run_training

pytestmark = pytest.mark.distributed


def test_a_changed_model_is_told_and_an_unchanged_one_is_not(tmp_path: Path):
    run = {"save": str(tmp_path / "run"), "load": str(tmp_path / "run"), "checkpoint_factor": 2}
    config = neox_config(tmp_path, train_iters=2, lr_decay_iters=20, **run)
    run_training(config, tmp_path)

    def settings_of(changes: dict[str, Any]) -> tuple[str, ...]:
        path = tmp_path / "again.yml"
        path.write_text(yaml.safe_dump(config | changes))
        return plan_launch(load_config([path], local_slots=lambda: 1)).plan.settings

    assert settings_of({}) == ()
    assert settings_of({"train_iters": 4, "log_interval": 7}) == ()
    assert settings_of({"rotary_pct": 0.5, "weight_decay": 0.2}) == (
        f"rotary_pct {config.get('rotary_pct', 1.0)} -> 0.5",
        f"weight_decay {config.get('weight_decay', 0.1)} -> 0.2",
    )
