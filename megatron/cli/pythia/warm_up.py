"""Adam's moments, rebuilt from the batches before the step that a run begins from.

    1  a checkpoint K steps earlier, with the step's weights, an Adam that has seen nothing and a
       learning rate of 0
    2  K steps of an ordinary run from it: weights stay as they are, moments gather
    3  the moments, corrected for having begun at zero, go into the checkpoint at the step

They are those of gradients at the step's weights, where the run had each step's own; of the K
batches, which are the run's. betas 0.9 and 0.95 forget in some 20 and 60 steps.
"""

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron.base.errors import CheckpointError, ConfigError
from megatron.checkpoint.parameter_state import ParameterStates, open_parameter_states
from megatron.checkpoint.stored import StoredCheckpoint, read_model_facts
from megatron.cli.pythia.importing import (
    Imported,
    import_step,
    require_good,
    require_no_moments,
    write_start_of_warm_up,
)
from megatron.cli.pythia.models import ReleasedModel, model_of_files
from megatron.cli.pythia.written_start import Moments
from megatron.config.load import override
from megatron.config.yaml_files import read_config_files

__all__ = ["Launch", "import_warm", "launched"]

Launch = Callable[[Path], int]
"""Runs training with a configuration file to its end; returns the exit status."""

_DEEPY = Path(__file__).parents[3] / "deepy.py"


def launched(config_file: Path) -> int:
    """Run ``deepy.py train.py`` as a user would."""
    command = [sys.executable, str(_DEEPY), str(_DEEPY.with_name("train.py")), str(config_file)]
    return subprocess.run(command, check=False).returncode


def import_warm(
    source: Path,
    destination: Path,
    model: ReleasedModel,
    step: int,
    num_steps: int,
    *,
    launch_files: Sequence[Path],
    launch: Launch = launched,
    skipped_steps: int = 0,
) -> Imported:
    """Write a checkpoint at ``step`` whose moments are those of the batches before it.

    What the warm-up wrote stays beside ``destination``, in a directory that ends in ``.warm-up``:
    its ledger proves which samples the moments are of.

    Args:
        source: weights of the step, in either form.
        destination: becomes a directory like a ``save``.
        model: what the source is of.
        step: as the hub's branches count.
        num_steps: how many batches.
        launch_files: configuration of this machine, as for a launch; their ``load`` and ``save``
            are left aside.
        launch: runs a configuration.
        skipped_steps: see :func:`import_step`.

    Raises:
        CheckpointError: the source is proven wrong, or the warm-up failed.
        ConfigError: there aren't so many batches before the step.
    """
    iteration = model.iteration(step)
    if not 1 <= num_steps <= iteration:
        raise ConfigError(
            f"warm:{num_steps}: K must be 1 to {iteration}, the batches before step {step}"
        )
    folder = destination.with_name(f"{destination.name}.warm-up")
    for path in (destination, folder):
        if path.exists():
            raise CheckpointError(f"{path} exists already; name a directory that doesn't")
    require_good(source, model, step)
    require_no_moments(source, model, step)
    folder.mkdir(parents=True)
    config_file = folder / "warm-up.yml"
    keys = _keys([*model.files, *launch_files], folder, iteration)
    config_file.write_text(yaml.safe_dump(keys, sort_keys=False))
    frozen = model_of_files([config_file], name=model.name, num_tokens=model.num_tokens)
    write_start_of_warm_up(source, folder / "start", frozen, iteration, num_steps)
    status = launch(config_file)
    checkpoint = folder / "run" / f"global_step{iteration}"
    if status != 0 or not checkpoint.is_dir():
        raise CheckpointError(
            f"the warm-up of {num_steps} steps ended with status {status} and left no "
            f"{checkpoint}; its configuration is {config_file}"
        )
    facts = read_model_facts(checkpoint, gpt_j_residual=model.settings.gpt_j_residual).model
    settings = replace(model.settings, padded_vocab_size=facts.padded_vocab_size)
    moments = _corrected(open_parameter_states(StoredCheckpoint(checkpoint), settings), model)
    return import_step(
        source, destination, model, step, skipped_steps=skipped_steps, moments=moments
    )


def _keys(files: Sequence[Path], folder: Path, iteration: int) -> dict[str, Any]:
    """Return the configuration of the warm-up, in one file."""
    written, _, problems = read_config_files(files)
    if problems:
        raise ConfigError(*problems)
    optimizer = dict(written["optimizer"].value)
    optimizer["params"] = {**optimizer.get("params", {}), "lr": 0.0}
    changed = override(
        written,
        {
            "optimizer": optimizer,
            "min_lr": 0.0,
            "load": str((folder / "start").resolve()),
            "save": str((folder / "run").resolve()),
            "extra_save_iters": [iteration],
            "checkpoint_factor": iteration,
            "exit_interval": iteration,
            "eval_interval": 2 * iteration + 1,
        },
        origin="warm-up",
    )
    return {name: item.value for name, item in changed.items()}


def _corrected(states: ParameterStates, model: ReleasedModel) -> Moments:
    """Return moments as an Adam that didn't begin at zero has them."""
    taken = states.step
    if not taken:
        raise CheckpointError(
            f"{states.stored.directory}: no step of the warm-up moved Adam; did all overflow?"
        )
    params = (model.config.deepspeed.optimizer or {}).get("params", {})
    betas = params.get("betas", (0.9, 0.999))
    size = model.tensor_parallel_size

    def reader(kind: Any, beta: float) -> Callable[[int, int, str], torch.Tensor]:
        share = -math.expm1(taken * math.log(beta)) if beta else 1.0

        def read(rank: int, layer: int, name: str) -> torch.Tensor:
            return states.part(layer, name, kind, size=size, rank=rank) / share

        return read

    return {"exp_avg": reader("exp_avg", betas[0]), "exp_avg_sq": reader("exp_avg_sq", betas[1])}
