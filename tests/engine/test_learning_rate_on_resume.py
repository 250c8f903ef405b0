"""With another schedule a resume stops, or goes on with the rate it was told to."""

from pathlib import Path

import pytest

from tests.engine.training_runs import neox_config, run_training
from tests.worlds import WorldFailed

pytestmark = pytest.mark.distributed


def test_override_trains_the_first_step_at_the_configured_rate(tmp_path: Path):
    run = {"save": str(tmp_path / "run"), "load": str(tmp_path / "run"), "checkpoint_factor": 2}
    run_training(neox_config(tmp_path, train_iters=2, lr_decay_iters=20, **run), tmp_path)
    higher = {"optimizer": {"type": "Adam", "params": {"lr": 0.02, "betas": [0.9, 0.95]}}}
    changed = neox_config(tmp_path, train_iters=4, lr_decay_iters=20, **run, **higher)
    with pytest.raises(WorldFailed, match=r"start_lr 0\.002 in the checkpoint, 0\.02 configured"):
        run_training(changed, tmp_path / "refused")
    overridden = run_training(changed | {"override_lr_scheduler": True}, tmp_path / "overridden")
    as_before = neox_config(tmp_path, train_iters=4, lr_decay_iters=20, **run)
    followed = run_training(as_before | {"iteration": 2}, tmp_path / "followed")
    # Step 3 starts from the same weights and data; its loss is the same, its effect is not.
    assert overridden.losses[0] == followed.losses[0]
    assert overridden.losses[1] != followed.losses[1]
    assert overridden.records[0].lr == pytest.approx(10 * followed.records[0].lr, rel=0.2)
