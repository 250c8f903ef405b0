"""A small run that would train, and ways to start it that tell what its user reads."""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.base.exit_codes import CANNOT_LAUNCH
from megatron.cli import deepy, exit_status
from megatron.cli.exit_status import run_command
from megatron.cli.train import train
from megatron.config.load import load_config
from megatron.engine.distributed import RankEnvironment
from megatron.stream.indexed_dataset import IndexedDatasetBuilder
from tests.worlds import RankContext, run_ranks

NUM_DOCUMENTS = 40
CONFIG: dict[str, Any] = {
    "num_gpus": 1,
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 8,
    "max_position_embeddings": 8,
    "pos_emb": "rotary",
    "precision": "fp32",
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
    "zero_optimization": {"stage": 0},
    "train_iters": 2,
    "train_micro_batch_size_per_gpu": 2,
    "eval_iters": 1,
    "tokenizer_type": "CharLevelTokenizer",  # needs no file
    "make_vocab_size_divisible_by": 64,
    "data_path": "text",
    "split": "8,1,1",
    "num_workers": 0,
    "distributed_backend": "gloo",
}


def write_dataset(prefix: Path, *, dtype: np.typing.DTypeLike = np.uint16) -> None:
    """Write documents of 5 to 29 tokens below 256."""
    random = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for _ in range(NUM_DOCUMENTS):
        builder.add_item(random.integers(1, 256, size=random.integers(5, 30)).astype(dtype))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def refusal(directory: Path, capsys: pytest.CaptureFixture[str], *files: str) -> str:
    """Start deepy.py with configuration ``files`` (their texts) and return what it refuses with.

    Nothing may be started and nothing may look like a defect.
    """
    script = directory / "script.py"
    script.write_text(f"open({str(directory / 'started')!r}, 'w').close()\n")
    names = []
    for letter, text in zip("abc", files, strict=False):
        names.append(str(directory / f"{letter}.yml"))
        Path(names[-1]).write_text(text)
    status = deepy.main([str(script), *names])
    printed = capsys.readouterr()
    assert status == deepy.CANNOT_LAUNCH, printed.err
    assert not (directory / "started").exists()
    assert "Traceback" not in printed.err
    assert printed.out == ""
    return printed.err


def config_file(**keys: Any) -> str:
    """Return the text of :data:`CONFIG` with ``keys`` on top; None removes a key."""
    merged = CONFIG | keys
    return json.dumps({name: value for name, value in merged.items() if value is not None})


@dataclass(frozen=True)
class RankEnd:
    """How ``train.py`` ended on one rank."""

    status: int
    stderr: str
    losses: list[float]


def train_in_forked_ranks(directory: Path, **keys: Any) -> list[RankEnd]:
    """Train :data:`CONFIG` with ``keys`` as ``train.py`` would, on ranks forked from here."""
    keys = {"data_path": str(directory / "text"), **keys}
    config = load_config([], CONFIG | keys, local_slots=lambda: 1, environ={})
    world_size = config.topology.world_size

    def rank(context: RankContext) -> RankEnd:
        exit_status._TELLER_ENDS_FIRST_S = 0.0  # no launcher looks who ends first
        me = RankEnvironment(context.rank, context.rank, world_size, context.init_method)
        losses: list[float] = []
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            status = run_command(lambda: train(config, me, on_loss=losses.append).exit_code)
        return RankEnd(status, stderr.getvalue(), losses)

    return run_ranks(rank, world_size, directory)


def the_one_message(ends: Sequence[RankEnd], *, teller: int = 0) -> str:
    """Return what the run failed with: every rank fails before its first step, and one says why."""
    assert all(end.status == CANNOT_LAUNCH for end in ends)
    assert all(end.losses == [] for end in ends)
    lines = [line for end in ends for line in end.stderr.splitlines()]
    assert lines == ends[teller].stderr.splitlines()
    return ends[teller].stderr
