"""Runs of real NeoX v1.0 on CPU: checkpoint, data, losses, digests (tests/data/pythia)."""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megatron.config.load import load_config
from megatron.config.run_config import RunConfig
from megatron.model.facts import ModelFacts
from megatron.model.settings import ModelSettings
from megatron.stream.indexed_dataset import IndexedDatasetBuilder

__all__ = [
    "RUNS",
    "VOCABULARY",
    "continued_config",
    "digest",
    "golden",
    "losses",
    "model_settings",
    "run_config",
    "unpack",
]

_DATA = Path(__file__).parents[1] / "data" / "pythia"
RUNS = ("tp1_dp2_zero1", "tp2_dp2_zero1", "tp1_dp2_zero0_pp0")
VOCABULARY = 256


def unpack(run: str, folder: Path) -> Path:
    """Return a directory with what was recorded of ``run``."""
    with tarfile.open(_DATA / f"{run}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / run


def golden(recorded: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return digests of every parameter's state at step 5, by rank (``mp00``) and name."""
    return json.loads((recorded / "golden_step5.json").read_text())


def digest(tensor: torch.Tensor) -> str:
    """Return the digest that the recorded ones are."""
    values = np.ascontiguousarray(tensor.detach().numpy())
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


def losses(recorded: Path, log: str) -> list[float]:
    """Return the losses of ``train_log``, ``train_log_resume`` or ``train_log_resume_fixstep``."""
    return [line["lm_loss"] for line in json.loads((recorded / f"{log}.json").read_text())]


def written_config(recorded: Path) -> dict[str, Any]:
    """Return the configuration the run had."""
    return yaml.safe_load((recorded / "global_step5" / "configs" / "tiny.yml").read_text())


def run_config(recorded: Path) -> RunConfig:
    """Return the configuration the run had, resolved."""
    return load_config(
        [recorded / "global_step5" / "configs" / "tiny.yml"], {}, local_slots=lambda: 4
    )


def model_settings(recorded: Path) -> ModelSettings:
    """Return the model of the run."""
    config = run_config(recorded)
    facts = ModelFacts(VOCABULARY, config.parallelism.model_parallel_size)
    return ModelSettings.from_config(config.model, config.training, facts, neox_version="v1.0")


def continued_config(recorded: Path, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a launch that goes on from step 5 to step 10 on the same rows.

    The rows become a preshuffled dataset beside the run; what the checkpoint says it was trained on
    is changed to it, in the form in which a configuration of ours says so.
    """
    data = recorded / "rows"
    if not data.with_suffix(".idx").exists():
        _write_dataset(data, np.load(recorded / "data_tokens.npy"))
    written = written_config(recorded) | {"data-order": "sequential"}
    for split in ("train", "valid", "test"):
        written[f"{split}-data-paths"] = [str(data)]
    written.pop("save", None)
    for folder in recorded.glob("global_step*"):
        (folder / "configs").mkdir(exist_ok=True)
        (folder / "configs" / "tiny.yml").write_text(yaml.safe_dump(written))
    names = {name.replace("-", "_"): value for name, value in written.items()}
    launch = {
        "num_gpus": 2 * names["model_parallel_size"],
        "load": str(recorded),
        "neox_version": "v1.0",
        "exit_interval": 10,
    }
    return names | launch | changes


def _write_dataset(prefix: Path, rows: np.ndarray) -> None:
    builder = IndexedDatasetBuilder(prefix.with_suffix(".bin"), np.uint16)
    for row in rows:
        builder.add_item(row)
        builder.end_document()
    builder.finalize(prefix.with_suffix(".idx"))
