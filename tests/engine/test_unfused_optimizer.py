"""bfloat16 without ZeRO and without a pipeline: DeepSpeed's unfused optimizer, made honest."""

from pathlib import Path

import pytest
import torch

from tests.engine.training_runs import checkpoint_tensors, neox_config, run_training

pytestmark = pytest.mark.distributed


def test_adam_has_counted_the_steps_taken_and_no_other(tmp_path: Path):
    config = neox_config(
        tmp_path,
        pipe_parallel_size=0,
        precision="bfloat16",
        zero_optimization={"stage": 0},
        train_iters=2,
        save=str(tmp_path / "run"),
        checkpoint_factor=2,
    )
    run_training(config, tmp_path)
    checkpoint = tmp_path / "run" / "global_step2" / "mp_rank_00_model_states.pt"
    optimizer = torch.load(checkpoint, weights_only=False)["optimizer"]
    groups = optimizer["optimizer_state_dict"]["param_groups"]
    assert [group["step"] for group in groups] == [2, 2]
    assert checkpoint_tensors(checkpoint.parent)
