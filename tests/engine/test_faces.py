"""What scripts written for NeoX import."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

import megatron.training
from megatron.neox_arguments import NeoXArgs
from tests.engine.training_runs import neox_config
from tests.worlds import RankContext, run_ranks

pytestmark = pytest.mark.distributed


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def neox_args(tmp_path: Path, context: RankContext) -> NeoXArgs:
    # The launcher's variables, as a script of NeoX's users would find them.
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(free_port())
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(neox_config(tmp_path, train_iters=3, lr_decay_iters=20)))
    return NeoXArgs.from_ymls([str(path)])


def test_pretrain_tells_every_loss_to_the_hook(tmp_path: Path):
    def worker(context: RankContext) -> list[float]:
        losses: list[Any] = []
        megatron.training.collect_loss_for_unit_test = losses.append
        megatron.training.pretrain(neox_args(tmp_path, context))
        return losses

    (losses,) = run_ranks(worker, 1, tmp_path)
    assert len(losses) == 3
    assert losses[0] > losses[-1] > 0


def test_a_model_that_is_set_up_takes_steps(tmp_path: Path):
    def worker(context: RankContext) -> list[float]:
        arguments = neox_args(tmp_path, context)
        model, _, scheduler, _ = megatron.training.setup_model_and_optimizer(arguments)
        losses = [
            megatron.training.forward_step(None, model, arguments, is_train=True) for _ in range(2)
        ]
        assert scheduler.num_iters == 2
        return [*losses, megatron.training.forward_step(None, model, arguments)]

    (losses,) = run_ranks(worker, 1, tmp_path)
    assert losses[0] > losses[1] > 0
    assert losses[2] > 0
