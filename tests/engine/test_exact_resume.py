"""Stopped in the middle and resumed, a run is bit for bit the one that never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.test_topologies import TOPOLOGIES
from tests.engine.training_runs import checkpoint_tensors, neox_config, run_training

pytestmark = pytest.mark.distributed

STEPS, STOP = 8, 4


def config(
    tmp_path: Path, save: str, topology: str, precision: str, dropout: float
) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "save": str(tmp_path / save),
        "load": str(tmp_path / save),
        "train_iters": STEPS,
        "lr_decay_iters": STEPS,
        "checkpoint_factor": STOP,
        "eval_interval": STOP,
        "hidden_dropout": dropout,
        "attention_dropout": dropout,
        "precision": precision,
    }
    if precision == "bfloat16":
        changes["data_types"] = {"grad_accum_dtype": "fp32"}
    return neox_config(tmp_path, **changes, **TOPOLOGIES[topology])


def assert_resume_is_exact(tmp_path: Path, topology: str, precision: str, dropout: float) -> None:
    undisturbed = config(tmp_path, "whole", topology, precision, dropout)
    whole = run_training(undisturbed, tmp_path / "whole-world")
    interrupted = config(tmp_path, "parts", topology, precision, dropout)
    first = run_training(interrupted | {"exit_interval": STOP}, tmp_path / "first-world")
    second = run_training(interrupted, tmp_path / "second-world")
    assert first.losses + second.losses == whole.losses
    assert [record.step for record in second.records] == list(range(STOP + 1, STEPS + 1))
    numbers = [(r.position, r.loss, r.lr, r.grad_norm) for r in whole.records]
    assert [
        (r.position, r.loss, r.lr, r.grad_norm) for r in (*first.records, *second.records)
    ] == numbers
    assert_same_tensors(
        tmp_path / "whole" / f"global_step{STEPS}", tmp_path / "parts" / f"global_step{STEPS}"
    )


def assert_same_tensors(expected: Path, actual: Path) -> None:
    """Weights, optimizer state and random states, of every rank."""
    tensors, others = checkpoint_tensors(expected), checkpoint_tensors(actual)
    assert tensors.keys() == others.keys()
    assert len(tensors) > 20
    different = [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])]
    assert different == []


@pytest.mark.parametrize(
    ("topology", "precision", "dropout"),
    [
        ("one process", "fp32", 0.1),
        ("sequential", "bfloat16", 0.1),
        ("TP2", "bfloat16", 0.1),
        ("PP2", "fp32", 0.1),
        ("DP2", "fp32", 0.1),
        ("TP2 x PP2", "fp32", 0.0),
        ("TP2 x PP2", "bfloat16", 0.1),
    ],
)
def test_resume_is_exact(topology: str, precision: str, dropout: float, tmp_path: Path):
    assert_resume_is_exact(tmp_path, topology, precision, dropout)


@pytest.mark.matrix
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_resume_is_exact_everywhere(topology: str, precision: str, dropout: float, tmp_path: Path):
    assert_resume_is_exact(tmp_path, topology, precision, dropout)
