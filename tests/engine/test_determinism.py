"""``deterministic: true``, as far as a machine without GPUs can tell."""

import os
from pathlib import Path

import pytest
import torch

from megatron.engine.determinism import use_deterministic_kernels
from tests.engine.training_runs import neox_config, run_training
from tests.worlds import RankContext, run_ranks


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("set_by_user", "expected"), [(None, ":4096:8"), (":16:8", ":16:8")], ids=["unset", "set"]
)
def test_kernels_are_chosen_for_the_process_and_cublas_is_told(
    set_by_user: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if set_by_user is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", set_by_user)

    def worker(context: RankContext) -> tuple[bool, bool, str]:
        use_deterministic_kernels()
        assert not torch.empty(1 << 20).isnan().all()  # new memory isn't filled
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            os.environ["CUBLAS_WORKSPACE_CONFIG"],
        )

    assert run_ranks(worker, 1, tmp_path) == [(True, False, expected)]


@pytest.mark.distributed
def test_on_a_cpu_the_numbers_are_those_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def chosen_aloud() -> None:
        use_deterministic_kernels()
        print("kernels are chosen")

    monkeypatch.setattr("megatron.cli.train.use_deterministic_kernels", chosen_aloud)
    config = neox_config(tmp_path, train_iters=4, hidden_dropout=0.1, attention_dropout=0.1)
    plain = run_training(config, tmp_path / "plain")
    chosen = run_training(config | {"deterministic": True}, tmp_path / "chosen")
    assert "kernels are chosen" in chosen.printed
    assert "kernels are chosen" not in plain.printed
    assert chosen.losses == plain.losses
