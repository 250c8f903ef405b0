"""Going on from NeoX v1.0's checkpoints with its numerics gives its losses, at any topology."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine.training_runs import TrainedRun, run_training
from tests.pythia.recorded_runs import RUNS, continued_config, losses, unpack

pytestmark = pytest.mark.distributed

ROUNDING = 5e-5  # of fp16: another order of additions alone gives 1e-5 to 3e-5
ZERO_1 = RUNS[:2]
ONE_REPLICA = {"gradient_accumulation_steps": 2}
TOPOLOGIES = {
    "one process": {"num_gpus": 1} | ONE_REPLICA,
    "sequential": {"pipe_parallel_size": 0},
    "TP2": {"model_parallel_size": 2, "num_gpus": 2} | ONE_REPLICA,
    "PP2": {"pipe_parallel_size": 2, "num_gpus": 2} | ONE_REPLICA,
    "TP2 x PP2": {"model_parallel_size": 2, "pipe_parallel_size": 2, "num_gpus": 4} | ONE_REPLICA,
    "ZeRO 0": {"zero_optimization": {"stage": 0}},
}


@pytest.fixture(autouse=True)
def vocabulary_of_the_runs(monkeypatch: pytest.MonkeyPatch):
    # They had a stand-in of 250 characters; NeoX's tokenizer of that name has 512.
    monkeypatch.setattr("megatron.data.tokenizers._CharLevelTokenizer.vocab_size", 250)


def train(recorded: Path, world: Path, **changes: Any) -> TrainedRun:
    return run_training(continued_config(recorded, **changes), world, allows_fp16=True)


def distance(found: list[float], expected: list[float]) -> float:
    """Print and return the largest relative difference."""
    assert len(found) == len(expected)
    largest = max(abs(one - other) / other for one, other in zip(found, expected, strict=True))
    print(f"losses within {largest:.1e}")
    return largest


@pytest.mark.parametrize("run", RUNS)
def test_it_goes_on_as_if_v1_had_never_stopped(run: str, tmp_path: Path):
    recorded = unpack(run, tmp_path)
    trained = train(recorded, tmp_path / "world")
    assert distance(trained.losses, losses(recorded, "train_log")[5:]) < ROUNDING
    fixed = "train_log_resume" + ("_fixstep" if run in ZERO_1 else "")
    assert distance(trained.losses, losses(recorded, fixed)) < ROUNDING


@pytest.mark.parametrize("run", ZERO_1)
def test_the_old_resume_rule_gives_what_v1s_own_resume_gave(run: str, tmp_path: Path):
    recorded = unpack(run, tmp_path)
    trained = train(recorded, tmp_path / "world", adam_step_on_load="neox-v1-resume")
    expected = losses(recorded, "train_log_resume")
    assert distance(trained.losses, expected) < ROUNDING
    assert distance(losses(recorded, "train_log")[5:], expected) > 2e-4  # so the rule matters


def test_from_the_first_weights_on_every_step_is_v1s(tmp_path: Path):
    recorded = unpack("tp1_dp2_zero1", tmp_path)
    trained = train(recorded, tmp_path / "world", iteration=0, no_load_optim=True)
    assert distance(trained.losses, losses(recorded, "train_log")) < ROUNDING


MATRIX = [
    (run, topology)
    for run in RUNS
    for topology in TOPOLOGIES
    if (run, topology) != ("tp1_dp2_zero1", "TP2 x PP2")
]


@pytest.mark.parametrize(
    ("run", "topology"),
    [
        ("tp1_dp2_zero1", "TP2 x PP2"),
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in MATRIX),
    ],
)
def test_at_another_topology_the_losses_are_equal_to_rounding(
    run: str, topology: str, tmp_path: Path
):
    recorded = unpack(run, tmp_path)
    changes = dict(TOPOLOGIES[topology])
    if run == "tp2_dp2_zero1":  # its batch is twice as large
        changes = {"model_parallel_size": 1, "num_gpus": 2} | changes
        if "gradient_accumulation_steps" in changes:
            changes["gradient_accumulation_steps"] = 4
    trained = train(recorded, tmp_path / "world", **changes)
    assert "the optimizer's state is resharded, exactly" in trained.printed
    assert distance(trained.losses, losses(recorded, "train_log")[5:]) < ROUNDING


def test_a_run_of_ours_goes_on_from_its_own_checkpoint_bit_for_bit(tmp_path: Path):
    recorded = unpack("tp1_dp2_zero1", tmp_path)
    whole = train(recorded, tmp_path / "world")
    save = str(tmp_path / "save")
    first = train(recorded, tmp_path / "first", save=save, exit_interval=8, checkpoint_factor=4)
    assert (tmp_path / "save" / "global_step8").is_dir()
    second = train(recorded, tmp_path / "second", save=save, load=save, extra_save_iters=[])
    assert first.losses + second.losses == whole.losses
