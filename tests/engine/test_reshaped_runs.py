"""Stopped and launched again on other GPUs: the same samples, and the losses of one long run."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.activation_checkpointing import checkpointing

from megatron.config.topology import Topology
from megatron.engine.distributed import RankEnvironment, connect
from megatron.engine.seeding import (
    prepare_random_state,
    resumed_seed,
    seed_resumed_run,
    tensor_parallel_stream,
)
from tests.engine.test_topologies import TOPOLOGIES
from tests.engine.training_runs import TrainedRun, neox_config, run_training
from tests.worlds import run_ranks

pytestmark = pytest.mark.distributed

STEPS, STOP = 14, 4  # the ten steps after the change are compared


def config(tmp_path: Path, save: str, **changes: Any) -> dict[str, Any]:
    return neox_config(
        tmp_path,
        **{
            "save": str(tmp_path / save),
            "load": str(tmp_path / save),
            "train_iters": STEPS,
            "lr_decay_iters": STEPS,
            "checkpoint_factor": STOP,
            "eval_interval": 100,
            "gradient_clipping": 1.0,
        }
        | changes,
    )


def stopped(tmp_path: Path, save: str, **changes: Any) -> TrainedRun:
    return run_training(config(tmp_path, save, exit_interval=STOP, **changes), tmp_path / "first")


def numbers(run: TrainedRun) -> list[Any]:
    return [(record.step, record.position, record.samples, record.digest) for record in run.records]


QUICK = ("TP2 x PP2", "DP2", {})
MATRIX = [
    ("DP2", "sequential", {"precision": "bfloat16"}),
    *(
        (source, target, {"zero_optimization": {"stage": stage}})
        for source, target in [
            ("one process", "TP2 x PP2"),
            ("TP2", "PP2"),
            ("PP2", "DP2"),
            ("DP2", "TP2"),
            ("sequential", "TP2 x PP2"),
        ]
        for stage in (0, 1)
    ),
]


@pytest.mark.parametrize(
    ("source", "target", "changes"),
    [
        QUICK,
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in MATRIX),
    ],
)
def test_a_run_goes_on_on_other_gpus_as_if_it_had_them_all_along(
    source: str, target: str, changes: dict[str, Any], tmp_path: Path
):
    undisturbed = run_training(
        config(tmp_path, "whole", **TOPOLOGIES[source], **changes), tmp_path / "whole-world"
    )
    first = stopped(tmp_path, "parts", **TOPOLOGIES[source], **changes)
    second = run_training(
        config(tmp_path, "parts", **TOPOLOGIES[target], **changes), tmp_path / "second"
    )
    assert numbers(first) + numbers(second) == numbers(undisturbed)
    rel = 1e-5 if "precision" not in changes else 5e-3
    assert first.losses + second.losses == pytest.approx(undisturbed.losses, rel=rel)
    norms = [record.grad_norm for record in (*first.records, *second.records)]
    expected = [record.grad_norm for record in undisturbed.records]
    assert norms == pytest.approx(expected, rel=1e-3 if rel == 1e-5 else 0.2)
    assert [r.lr for r in second.records] == [r.lr for r in undisturbed.records[STOP:]]
    assert "note: the optimizer's state is resharded, exactly: it was written at" in second.printed
    assert "dropout's are seeded from (seed, step, stage, tensor rank)" in second.printed


def test_dropout_after_a_change_is_the_same_at_every_launch(tmp_path: Path):
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    stopped(tmp_path, "save", **TOPOLOGIES["PP2"], **dropout)
    shutil.copytree(tmp_path / "save", tmp_path / "copy")
    losses = [
        run_training(
            config(tmp_path, save, train_iters=STOP + 2, **TOPOLOGIES["TP2"], **dropout)
            | {"lr_decay_iters": STEPS},
            tmp_path / f"world-{save}",
        ).losses
        for save in ("save", "copy")
    ]
    assert losses[0] == losses[1]


@pytest.mark.matrix
def test_the_precision_changes_in_the_middle_of_a_run(tmp_path: Path):
    undisturbed = run_training(config(tmp_path, "whole"), tmp_path / "whole-world")
    stopped(tmp_path, "parts")
    second = run_training(config(tmp_path, "parts", precision="bfloat16"), tmp_path / "second")
    assert "holds torch.float32 weights, this run trains torch.bfloat16" in second.printed
    assert "random states" not in second.printed  # the topology is the writer's
    assert second.losses == pytest.approx(undisturbed.losses[STOP:], rel=5e-3)


def test_seeds_depend_on_run_step_and_stage():
    seeds = {
        resumed_seed(seed, step=step, stage=stage)
        for seed in (1234, 1235)
        for step in (0, 10, 11)
        for stage in range(4)
    }
    assert len(seeds) == 24
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert resumed_seed(1234, step=10, stage=1) == 1564875038


def test_tensor_ranks_share_one_stream_and_have_one_each(tmp_path: Path):
    topology = Topology(2, 1, 2)

    def worker(context: Any) -> Any:
        environment = RankEnvironment(
            context.rank, context.rank, context.world_size, context.init_method
        )
        groups = connect(environment, topology, backend="gloo")
        prepare_random_state(groups, 1234, partition_activations=False)
        torch.rand(context.rank)
        seed_resumed_run(groups, 1234, step=10)
        with tensor_parallel_stream():
            own = float(torch.rand(()))
        assert list(checkpointing.get_cuda_rng_tracker().get_states()) == ["model-parallel-rng"]
        return float(torch.rand(())), random.random(), float(np.random.rand()), own

    first, second, third, fourth = run_ranks(worker, 4, tmp_path)
    assert first[:3] == second[:3]  # tensor ranks of the first stage
    assert third[:3] == fourth[:3]
    assert not set(first[:3]) & set(third[:3])
    assert len({first[3], second[3], third[3], fourth[3]}) == 4
