"""The same model and data, divided over ranks in other ways: the same losses."""

from pathlib import Path

import pytest

from tests.engine.training_runs import ORACLE, neox_config, run_training

pytestmark = pytest.mark.distributed

TOPOLOGIES = {
    "one process": {},
    "sequential": {"pipe_parallel_size": 0},
    "TP2": {"model_parallel_size": 2},
    "PP2": {"pipe_parallel_size": 2},
    "DP2": {"num_gpus": 2, "gradient_accumulation_steps": 1},
    "TP2 x PP2": {"model_parallel_size": 2, "pipe_parallel_size": 2},
}


@pytest.fixture(scope="module")
def losses_of_one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    directory = tmp_path_factory.mktemp("one")
    return run_training(shared_start(directory), directory).losses


def shared_start(directory: Path, **changes: object) -> dict[str, object]:
    # b's weights: a vocabulary padded to 384 and biases that count twice, whatever the topology.
    initial = {"load": str(ORACLE / "ckpt_b_step0"), "iteration": 0, "finetune": True}
    clip = {"gradient_clipping": 1.0}  # acts in the first steps: the norms must agree too
    return neox_config(directory, "a", **initial, **clip, **changes)


@pytest.mark.parametrize("topology", [name for name in TOPOLOGIES if name != "one process"])
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_losses_do_not_depend_on_the_topology(
    topology: str, zero_stage: int, losses_of_one_process: list[float], tmp_path: Path
):
    zero = {"zero_optimization": {"stage": zero_stage}}
    config = shared_start(tmp_path, **TOPOLOGIES[topology], **zero)
    trained = run_training(config, tmp_path)
    assert trained.losses == pytest.approx(losses_of_one_process, rel=1e-5)


def test_a_clipped_run_differs_from_an_unclipped_one(
    losses_of_one_process: list[float], tmp_path: Path
):
    unclipped = run_training(shared_start(tmp_path) | {"gradient_clipping": 0.0}, tmp_path).losses
    assert unclipped != pytest.approx(losses_of_one_process, rel=1e-4)


def test_activation_checkpointing_changes_no_number(
    losses_of_one_process: list[float], tmp_path: Path
):
    config = shared_start(tmp_path, checkpoint_activations=True, checkpoint_num_layers=1)
    assert run_training(config, tmp_path).losses == losses_of_one_process


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_2_and_3_without_a_pipeline(
    stage: int, losses_of_one_process: list[float], tmp_path: Path
):
    changes = {"zero_optimization": {"stage": stage}, "pipe_parallel_size": 0, "num_gpus": 2}
    config = shared_start(tmp_path, gradient_accumulation_steps=1, **changes)
    trained = run_training(config, tmp_path)
    assert trained.losses == pytest.approx(losses_of_one_process, rel=1e-5)
