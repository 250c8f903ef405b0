"""Going on from NeoX v1.0's checkpoints with its numerics gives its losses, at any topology."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.engine.training_runs import TrainedRun, run_training
from tests.pythia.recorded_runs import RUNS, continued_config, losses, unpack
from tests.worlds import WorldFailed

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


def lay_flat(recorded: Path) -> Path:
    """Return a directory with the checkpoint's files directly in it, as a hub has them."""
    flat = recorded / "pythia"
    shutil.copytree(recorded / "global_step5", flat)
    shutil.move(flat / "configs" / "tiny.yml", flat / "TINY.yml")
    (flat / "configs").rmdir()
    for path in flat.glob("zero_*"):
        path.rename(flat / path.name.replace("_optim_states", "optim_states"))
    return flat


def test_files_directly_in_the_directory_are_a_checkpoint(tmp_path: Path):
    recorded = unpack("tp1_dp2_zero1", tmp_path)
    config = continued_config(recorded)
    flat = lay_flat(recorded)
    save = str(tmp_path / "save")
    config |= {"load": str(flat), "save": save, "checkpoint_factor": 4, "exit_interval": 8}
    first = run_training(config, tmp_path / "first", allows_fp16=True)
    again = config | {"exit_interval": 10}  # the same command goes on from what it saved
    second = run_training(again, tmp_path / "second", allows_fp16=True)
    found = first.losses + second.losses
    assert distance(found, losses(recorded, "train_log")[5:]) < ROUNDING
    assert f"loaded {flat}, iteration 5" in first.printed
    with pytest.raises(WorldFailed, match=r"iteration: 7 was asked for, but .* of step 5"):
        run_training(
            config | {"iteration": 7, "save": str(tmp_path / "other")},
            tmp_path / "third",
            allows_fp16=True,
        )


def test_a_run_of_ours_goes_on_from_its_own_checkpoint_bit_for_bit(tmp_path: Path):
    recorded = unpack("tp1_dp2_zero1", tmp_path)
    whole = train(recorded, tmp_path / "world")
    save = str(tmp_path / "save")
    first = train(recorded, tmp_path / "first", save=save, exit_interval=8, checkpoint_factor=4)
    assert (tmp_path / "save" / "global_step8").is_dir()
    second = train(recorded, tmp_path / "second", save=save, load=save, extra_save_iters=[])
    assert first.losses + second.losses == whole.losses
