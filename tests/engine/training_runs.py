"""Real training runs in forked worlds, and what they left behind."""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 - warms the parent that ranks are forked from
import torch
import yaml
from deepspeed.accelerator import get_accelerator

from megatron.cli.train import train
from megatron.config.load import load_config
from megatron.engine.distributed import RankEnvironment
from megatron.ledger.attempts import StepRecord, attempt_files, read_attempt
from tests.worlds import RankContext, run_ranks

__all__ = [
    "ORACLE",
    "TrainedRun",
    "checkpoint_tensors",
    "copy_corpus",
    "neox_config",
    "run_training",
]

DATA = Path(__file__).parents[1] / "data"
ORACLE = DATA / "oracle"


@dataclass(frozen=True)
class TrainedRun:
    """What one launch gave."""

    losses: list[float]  # of every step, as every rank saw it
    records: list[StepRecord]  # of the newest attempt; empty without `save`
    printed: str  # rank 0's standard output


def copy_corpus(directory: Path) -> dict[str, str]:
    """Copy corpus and tokenizer (index maps are written beside them) and return their keys."""
    for suffix in ("bin", "idx"):
        name = f"corpus_a_text_document.{suffix}"
        shutil.copy(DATA / "stream" / "oracle" / name, directory / name)
    shutil.copy(DATA / "tokenizer" / "tok.json", directory / "tok.json")
    return {
        "data_path": str(directory / "corpus_a_text_document"),
        "vocab_file": str(directory / "tok.json"),
    }


def neox_config(directory: Path, run: str = "a", **changes: Any) -> dict[str, Any]:
    """Return the configuration of a recorded NeoX run (a, b), on a corpus copied to ``directory``.

    It doesn't save, and doesn't clip: NeoX's runs didn't either, whatever their files say.
    """
    path = ORACLE / f"ckpt_{run}" / "global_step10" / "configs" / f"{run}.yml"
    config = yaml.safe_load(path.read_text())
    for key in ("save", "extra_save_iters", "checkpoint_factor", "steps_per_print"):
        config.pop(key, None)
    config |= copy_corpus(directory)
    config |= {"gradient_clipping": 0.0, "num_gpus": world_size(config | changes)}
    return config | changes


def world_size(config: Mapping[str, Any]) -> int:
    """Return the ranks of a configuration: its model's, or more if it asks for them."""
    model = max(1, config.get("pipe_parallel_size", 0)) * config.get("model_parallel_size", 1)
    return int(config.get("num_gpus") or model)


def run_training(
    config: Mapping[str, Any], tmp_path: Path, *, allows_fp16: bool = False, timeout_s: float = 300
) -> TrainedRun:
    """Train as ``config`` says in forked ranks.

    Args:
        config: NeoX keys.
        tmp_path: for files of the world.
        allows_fp16: tell DeepSpeed that this CPU can do fp16, which it can, slowly.
        timeout_s: of the whole run.
    """
    tmp_path.mkdir(parents=True, exist_ok=True)
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(dict(config)))
    ranks = world_size(config)
    resolved = load_config([path], {}, local_slots=lambda: ranks)
    output = tmp_path / "stdout.txt"

    def rank_main(context: RankContext) -> list[float]:
        if allows_fp16:
            type(get_accelerator()).is_fp16_supported = lambda self: True
        losses: list[float] = []
        environment = RankEnvironment(
            context.rank, context.rank, context.world_size, context.init_method
        )
        target = output if context.rank == 0 else Path(os.devnull)
        with target.open("w") as file, contextlib.redirect_stdout(file):
            train(resolved, environment, on_loss=losses.append)
        return losses

    losses = run_ranks(rank_main, ranks, tmp_path, timeout_s)
    assert all(of_rank == losses[0] for of_rank in losses), "ranks saw different losses"
    records = []
    if config.get("save"):
        records = list(read_attempt(attempt_files(Path(config["save"]))[-1]))
    return TrainedRun(losses[0], records, output.read_text())


def recorded(run: str) -> dict[str, Any]:
    """Return what NeoX recorded in a run: losses and evaluations."""
    return json.loads((ORACLE / "traces.json").read_text())[run]


def checkpoint_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint's files under ``file/path/of/keys``."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.pt")):
        content = torch.load(path, weights_only=False)  # our own file, of a second ago
        _collect(content, path.name, tensors)
    return tensors


def _collect(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> None:
    if torch.is_tensor(value):
        tensors[name] = value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _collect(inner, f"{name}/{key}", tensors)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _collect(inner, f"{name}/{index}", tensors)
