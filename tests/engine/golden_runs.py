"""NeoX's small recorded runs: configuration, initial weights as a checkpoint, data, tokenizer."""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.engine.training_runs import DATA

__all__ = ["golden_config", "golden_run"]

_GOLDEN = DATA / "golden_runs"
# Runs that were recorded from the initial weights of another one.
_WEIGHTS = {"z1": "pp1", "dp2": "pp1", "noloss": "pp1"}


def golden_run(name: str) -> dict[str, Any]:
    """Return what was recorded: config, losses, logged metrics."""
    return json.loads((_GOLDEN / "runs.json").read_text())[name]


def golden_config(name: str, directory: Path) -> dict[str, Any]:
    """Return the run's configuration, starting from its initial weights, in ``directory``."""
    config = dict(golden_run(name)["config"])
    for key in ("checkpoint_factor", "extra_save_iters", "keep_last_n_checkpoints"):
        config.pop(key, None)
    world = config.pop("global_num_gpus")
    for suffix in ("bin", "idx"):
        shutil.copy(DATA / "stream" / "golden" / f"big.{suffix}", directory / f"big.{suffix}")
    _write_tokenizer(directory / "words.json", golden_run(name)["orig_vocab_size"])
    _write_initial_checkpoint(directory / "initial" / "global_step0", _WEIGHTS.get(name, name))
    return config | {
        "data_path": str(directory / "big"),
        "vocab_file": str(directory / "words.json"),
        "num_gpus": world,
        "load": str(directory / "initial"),
        "iteration": 0,
        "finetune": True,
        "log_interval": 1,
    }


def _write_tokenizer(path: Path, num_words: int) -> None:
    words = {"<|endoftext|>": 0} | {f"w{number}": number for number in range(1, num_words)}
    Tokenizer(WordLevel(words, unk_token="<|endoftext|>")).save(str(path))


def _write_initial_checkpoint(directory: Path, weights: str) -> None:
    directory.mkdir(parents=True)
    recorded = np.load(_GOLDEN / f"{weights}_step0.npz")
    files: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key in recorded.files:
        file, name = key.split("/") if "/" in key else ("sequential", key)
        files[file][name] = torch.from_numpy(recorded[key])
    if "sequential" in files:
        for key, tensor in files.pop("sequential").items():
            _, index, name = key.split(".", 2)
            files[f"layer_{int(index):02d}-model_00-model_states.pt"][name] = tensor
    for file, tensors in files.items():
        torch.save(tensors, directory / file)
