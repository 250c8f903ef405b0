"""The same losses as NeoX, from its checkpoints, on its data, in its topologies."""

from pathlib import Path

import pytest

from tests.engine.training_runs import ORACLE, neox_config, recorded, run_training

pytestmark = pytest.mark.distributed


def start_from_step_0(run: str) -> dict[str, object]:
    return {"load": str(ORACLE / f"ckpt_{run}_step0"), "iteration": 0, "finetune": True}


@pytest.mark.parametrize("run", ["a", "b"])
def test_twenty_steps_and_all_evaluations_from_the_initial_weights(run: str, tmp_path: Path):
    config = neox_config(tmp_path, run, **start_from_step_0(run))
    trained = run_training(config, tmp_path)
    expected = recorded(run)
    assert trained.losses == pytest.approx(expected["losses"], rel=1e-5)
    assert evaluations(trained.printed) == pytest.approx(expected["evals"], rel=1e-5)


@pytest.mark.parametrize("run", ["a", "b"])
def test_ten_more_steps_from_the_checkpoint_with_optimizer_and_schedule(run: str, tmp_path: Path):
    config = neox_config(tmp_path, run, load=str(ORACLE / f"ckpt_{run}"))
    trained = run_training(config, tmp_path)
    expected = recorded(run)
    assert trained.losses == pytest.approx(expected["losses"][10:], rel=1e-5)
    # The validation data goes on behind the evaluation at step 10.
    assert evaluations(trained.printed) == pytest.approx(expected["evals"][1:], rel=1e-5)


def test_the_learning_rate_after_every_step(tmp_path: Path):
    config = neox_config(tmp_path, save=str(tmp_path / "run"), checkpoint_factor=100)
    trained = run_training(config, tmp_path)
    assert [record.lr for record in trained.records] == pytest.approx(recorded("a")["lr_after"])


def test_fp16_with_dynamic_loss_scale(tmp_path: Path):
    trained = run_training(
        fp16_config(tmp_path, initial_scale_power=12), tmp_path, allows_fp16=True
    )
    assert trained.losses == pytest.approx(recorded("a_fp16")["losses"], rel=2e-3)


def test_fp16_overflows_skip_the_same_steps(tmp_path: Path):
    # NeoX's pipeline does not divide the loss by the two micro steps, so its scale of 2^30 acts
    # like 2^31 here.
    config = fp16_config(
        tmp_path, initial_scale_power=31, loss_scale_window=4, hysteresis=1, save=True
    )
    trained = run_training(config, tmp_path, allows_fp16=True)
    skipped = [record.step for record in trained.records if record.skipped]
    assert skipped == [*range(1, 14), 19]
    assert skipped == [
        step for step, flag in enumerate(recorded("a_fp16ovf")["skipped"], start=1) if flag
    ]
    assert [record.position for record in trained.records] == [8 * step for step in range(20)]


def test_bfloat16(tmp_path: Path):
    changes = {"precision": "bfloat16", "data_types": {"grad_accum_dtype": "fp32"}}
    config = neox_config(tmp_path, **start_from_step_0("a"), **changes)
    trained = run_training(config, tmp_path)
    assert trained.losses == pytest.approx(recorded("a_bf16")["losses"], rel=2e-3)


def fp16_config(tmp_path: Path, *, save: bool = False, **scaler: float) -> dict[str, object]:
    block = {
        "enabled": True,
        "type": "fp16",
        "auto_cast": False,
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }
    saving = {"save": str(tmp_path / "run"), "checkpoint_factor": 100} if save else {}
    changes = {"precision": "fp16", "fp16": block | scaler, **saving}
    return neox_config(tmp_path, **start_from_step_0("a"), **changes)


def evaluations(printed: str) -> list[float]:
    lines = [line for line in printed.splitlines() if "lm_loss value:" in line]
    return [float(line.split("lm_loss value:")[1].split("|")[0]) for line in lines]
