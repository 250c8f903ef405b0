"""Where the optimizers of NeoX versions differ: Adam's first count, and when the scale doubles."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from hypothesis import given
from hypothesis import strategies as st

from megatron.checkpoint.flat_partitions import adam_steps
from megatron.checkpoint.safe_torch import read_torch_file
from megatron.engine.optimizer_numerics import (
    NEOX_MAIN,
    OptimizerNumerics,
    apply_optimizer_numerics,
)
from tests.engine.training_runs import neox_config, run_training

V1 = OptimizerNumerics.of("v1.0")


def zero_optimizer(window: int, hysteresis: int) -> Any:
    """Return as much of DeepSpeed's ZeRO optimizer as deals with the loss scale."""
    scaler = DynamicLossScaler(
        init_scale=2.0**40,
        scale_window=window,
        min_scale=1.0,
        delayed_shift=hysteresis,
        consecutive_hysteresis=False,
    )
    optimizer = SimpleNamespace(loss_scaler=scaler)
    optimizer._update_scale = lambda has_overflow: optimizer.loss_scaler.update_scale(has_overflow)
    return optimizer


def with_numerics(optimizer: Any, numerics: OptimizerNumerics) -> Any:
    apply_optimizer_numerics(
        SimpleNamespace(optimizer=optimizer, basic_optimizer=optimizer), numerics
    )
    return optimizer


class OldScaler:
    """v1.0's rule as its description has it (pythia.md §5.2)."""

    def __init__(self, window: int, hysteresis: int) -> None:
        self.scale, self.iteration, self.last_overflow = 2.0**40, 0, -1
        self.window, self.full, self.left = window, hysteresis, hysteresis

    def update(self, has_overflow: bool) -> None:
        if has_overflow:
            if self.left == 1:
                self.scale = max(self.scale / 2, 1)
            else:
                self.left -= 1
            self.last_overflow = self.iteration
        elif (self.iteration - self.last_overflow) % self.window == 0:
            self.left = self.full
            self.scale *= 2
        self.iteration += 1


@pytest.fixture
def rank_0(monkeypatch: pytest.MonkeyPatch):
    """The scaler asks for it before it logs."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)


@pytest.mark.usefixtures("rank_0")
@given(
    overflows=st.lists(st.booleans(), max_size=60),
    window=st.integers(1, 7),
    hysteresis=st.integers(1, 3),
)
def test_zeros_scale_follows_v1s_rule_step_by_step(overflows, window, hysteresis):
    optimizer = with_numerics(zero_optimizer(window, hysteresis), V1)
    expected = OldScaler(window, hysteresis)
    for has_overflow in overflows:
        optimizer._update_scale(has_overflow)
        expected.update(has_overflow)
        scaler = optimizer.loss_scaler
        assert scaler.cur_scale == expected.scale
        assert scaler.cur_iter == expected.iteration
        assert scaler.cur_hysteresis == expected.left
        assert scaler.last_overflow_iter == expected.last_overflow  # so files tell the truth


@pytest.mark.usefixtures("rank_0")
def test_the_first_doubling_is_in_step_1000_and_in_main_one_step_later():
    first = {}
    for numerics in (V1, NEOX_MAIN):
        optimizer = with_numerics(zero_optimizer(1000, 2), numerics)
        steps = 0
        while optimizer.loss_scaler.cur_scale == 2.0**40:
            optimizer._update_scale(False)
            steps += 1
        first[numerics] = steps
    assert first == {V1: 1000, NEOX_MAIN: 1001}


@pytest.mark.usefixtures("rank_0")
def test_the_rule_outlives_the_scaler_object_of_the_start():
    optimizer = with_numerics(zero_optimizer(4, 2), V1)
    optimizer.loss_scaler = zero_optimizer(3, 2).loss_scaler  # as loading a checkpoint does
    for _ in range(3):
        optimizer._update_scale(False)
    assert optimizer.loss_scaler.cur_scale == 2.0**41


ONE_LAYER = {"num_layers": 1, "attention_config": [[["global"], 1]]}
FP16 = {"enabled": True, "loss_scale": 0, "loss_scale_window": 2, "initial_scale_power": 8}
CASES = {
    # precision, stage, pipeline stages -> what Adam has counted after two updates
    "fp16, ZeRO 1": ({"precision": "fp16", "fp16": FP16}, 1, 1, 3),
    "fp16, ZeRO 0": ({"precision": "fp16", "fp16": FP16}, 0, 0, 3),
    "bf16, ZeRO 0, pipeline": ({"precision": "bfloat16"}, 0, 1, 3),
    "fp32, ZeRO 0": ({"precision": "fp32"}, 0, 0, 2),  # no wrapper, no dummy step
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_a_new_run_of_v1_has_counted_the_dummy_step(case: str, tmp_path: Path):
    changes, stage, pipeline, expected = CASES[case]
    config = neox_config(
        tmp_path,
        neox_version="v1.0",
        **ONE_LAYER,
        pipe_parallel_size=pipeline,
        zero_optimization={"stage": stage},
        train_iters=2,
        save=str(tmp_path / "run"),
        checkpoint_factor=2,
        **changes,
    )
    run_training(config, tmp_path, allows_fp16=True)
    checkpoint = tmp_path / "run" / "global_step2"
    found = list(checkpoint.glob("*zero_pp_rank_0_mp_rank_00*")) or [
        checkpoint / "mp_rank_00_model_states.pt"
    ]
    content = read_torch_file(found[0])
    state = content.get("optimizer_state_dict") or content["optimizer"]
    inner = state.get("base_optimizer_state") or state.get("optimizer_state_dict") or state
    assert adam_steps(inner) == expected
    if "loss_scaler" in state:
        assert type(state["loss_scaler"]) is DynamicLossScaler
        assert vars(state["loss_scaler"])["cur_scale"] == 2.0**9  # a window of 2 ends in step 2
        assert vars(state["loss_scaler"])["last_overflow_iter"] == -1


@pytest.mark.distributed
@pytest.mark.parametrize("pipeline", [0, 1])
def test_fp16_gradients_without_zero_are_those_of_zero(pipeline: int, tmp_path: Path):
    runs = {}
    for stage in (0, 1):
        config = neox_config(
            tmp_path,
            **ONE_LAYER,
            pipe_parallel_size=pipeline,
            precision="fp16",
            fp16=FP16 | {"loss_scale_window": 1000},
            zero_optimization={"stage": stage},
            gradient_clipping=1.0,
            train_iters=3,
            save=str(tmp_path / f"run{stage}"),
            checkpoint_factor=3,
        )
        runs[stage] = run_training(config, tmp_path / str(stage), allows_fp16=True)
    norms = [[record.grad_norm for record in run.records] for run in runs.values()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert norms[0][0] > 1.0  # so it is clipped
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)
