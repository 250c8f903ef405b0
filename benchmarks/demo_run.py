"""A run shaped like the demo's, on made-up tokens: what step_time.py and launch.py start."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tokenizers import Tokenizer, models

from megatron.stream.indexed_dataset import IndexedDatasetBuilder

__all__ = ["ROOT", "TOPOLOGIES", "launch", "write_config", "write_corpus"]

ROOT = Path(__file__).resolve().parents[1]

_PIPELINE_2_TENSOR_2 = {"num_gpus": 4, "pipe_parallel_size": 2, "model_parallel_size": 2}
TOPOLOGIES: dict[str, dict[str, int]] = {
    "plain engine, 1 process": {"num_gpus": 1, "pipe_parallel_size": 0, "model_parallel_size": 1},
    "pipeline engine, 1 process": {
        "num_gpus": 1,
        "pipe_parallel_size": 1,
        "model_parallel_size": 1,
    },
    "pipeline 2 x tensor 2": _PIPELINE_2_TENSOR_2,
}

_VOCABULARY = 2048  # the demo's
_DOCUMENTS, _TOKENS_PER_DOCUMENT = 600, 2000


def write_corpus(folder: Path) -> None:
    """Write a tokenizer and a dataset of random tokens, both of the demo's sizes."""
    words = ["<|endoftext|>", *(f"word{number}" for number in range(1, _VOCABULARY))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[1]))
    tokenizer.save(str(folder / "tokenizer.json"))
    random = np.random.default_rng(1234)
    builder = IndexedDatasetBuilder(folder / "corpus.bin", np.uint16)
    for _ in range(_DOCUMENTS):
        tokens = random.integers(1, _VOCABULARY, _TOKENS_PER_DOCUMENT, dtype=np.uint16)
        tokens[-1] = 0
        builder.add_item(tokens)
        builder.end_document()
    builder.finalize(folder / "corpus.idx")


def write_config(
    folder: Path, name: str, topology: Mapping[str, int], changes: Mapping[str, Any]
) -> Path:
    """Write the demo's configuration with another topology, other data and ``changes``.

    The run has no evaluations and no checkpoint but the one at its end.
    """
    settings = yaml.safe_load((ROOT / "configs/demo.yml").read_text())
    settings.pop("load")
    settings.update(topology)
    settings.update(
        data_path=str(folder / "corpus"),
        vocab_file=str(folder / "tokenizer.json"),
        save=str(folder / "save"),
        eval_iters=0,
        checkpoint_factor=10**6,
        log_interval=10,
    )
    settings.update(changes)
    path = folder / f"{name}.yml"
    path.write_text(json.dumps(settings, indent=1))
    return path


def launch(script: Path, config: Path, environ: Mapping[str, str]) -> None:
    """Run ``python deepy.py SCRIPT CONFIG`` to its end; what it says goes beside the config.

    Raises:
        RuntimeError: it failed; the message has its last lines.
    """

    shutil.rmtree(config.parent / "save", ignore_errors=True)
    command = [sys.executable, str(ROOT / "deepy.py"), str(script), str(config)]
    log = config.with_suffix(".log")
    with log.open("wb") as output:
        status = subprocess.run(
            command, env=dict(environ), stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status:
        tail = log.read_text(errors="replace").splitlines()[-30:]
        raise RuntimeError(f"{' '.join(command)} ended with {status}:\n" + "\n".join(tail))
