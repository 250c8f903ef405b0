"""A checkpoint that a launch goes on from at step N, made of what was downloaded of that step.

<save>/latest
<save>/tokenizer/              what a hub directory has of it
<save>/global_stepN/
    layer_XX-model_YY-…        weights
    mp_rank_YY_model_states.pt step, learning-rate step, Adam's step; no random states
    configs/*.yml              from which a launch works out what the steps so far consumed
    ledger.json                the model's pinned facts, no lineage: that is adopted at launch
    manifest.json

Of weights alone ("cold") Adam's moments are zeros and its masters are the weights; neither takes
room. A checkpoint of NeoX's that has its optimizer's state is taken as it is, file by file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import CheckpointError, ConfigError
from megatron.checkpoint.hugging_face.values import DTYPES
from megatron.checkpoint.new_directory import new_directory
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.cli.pythia.checks import check_release, measure_all
from megatron.cli.pythia.comparison import Measurements
from megatron.cli.pythia.downloaded import Downloaded, open_downloaded
from megatron.cli.pythia.file_checks import has_optimizer
from megatron.cli.pythia.findings import Finding
from megatron.cli.pythia.models import ReleasedModel, schedule_of
from megatron.cli.pythia.written_start import Counters, Moments, take_as_it_is, write_start
from megatron.ledger.run_directory import write_latest

__all__ = [
    "Imported",
    "import_step",
    "import_with_moments_of",
    "require_good",
    "require_no_moments",
    "write_start_of_warm_up",
]


@dataclass(frozen=True)
class Imported:
    """What was written."""

    checkpoint: Path
    step: int
    position: int  # of the next sample
    learning_rate: float  # of the next step
    learning_rate_step: int
    adam_step: int | None  # None: the checkpoint's
    num_bytes: int
    findings: tuple[Finding, ...]  # of the check, none of them proof
    notices: tuple[str, ...]


def import_step(
    source: Path,
    destination: Path,
    model: ReleasedModel,
    step: int,
    *,
    skipped_steps: int = 0,
    moments: Moments | None = None,
) -> Imported:
    """Write a checkpoint of ours at ``step`` into a new directory.

    Args:
        source: what was downloaded; refused if its content proves it wrong.
        destination: becomes a directory like a ``save``.
        model: what the source is of.
        step: as the hub's branches count.
        skipped_steps: steps whose fp16 gradients overflowed; Hugging Face's files don't say. They
            moved neither learning rate nor Adam.
        moments: of Adam; None: zeros.

    Raises:
        CheckpointError: the source is proven wrong or can't be read, or the destination exists or
            can't be written; nothing is left behind.
    """
    iteration = model.iteration(step)
    kept: list[Measurements] = []
    findings = require_good(source, model, step, keep=kept.append)
    downloaded = open_downloaded(source, model.settings, iteration=iteration)
    with new_directory(destination, "convert") as temporary:
        directory = temporary / f"global_step{iteration}"
        (directory / "configs").mkdir(parents=True)
        for name, text in model.config.config_files.items():
            write_atomically(directory / "configs" / name, text)
        stored = downloaded.stored
        if stored is not None and has_optimizer(stored):
            if skipped_steps:
                raise ConfigError(
                    f"--skipped-steps {skipped_steps}: {source} says itself how many there were; "
                    "leave it out"
                )
            notices = take_as_it_is(stored, directory)
            adam_step = None
            learning_rate_step = _stored_count(stored, iteration)
        else:
            counters = Counters.of(model, iteration, skipped_steps)
            learning_rate_step, adam_step = counters.updates, counters.adam_step
            notices = write_start(
                downloaded,
                directory,
                model,
                counters,
                moments=moments,
                dtype=_fits(kept, model),
            )
        write_latest(temporary, iteration)
    checkpoint = destination / directory.name
    return Imported(
        checkpoint=checkpoint,
        step=iteration,
        position=iteration * model.config.geometry.global_batch_size,
        learning_rate=schedule_of(model.config).schedule().at(learning_rate_step),
        learning_rate_step=learning_rate_step,
        adam_step=adam_step,
        num_bytes=sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
        findings=tuple(findings),
        notices=tuple(notices),
    )


def write_start_of_warm_up(
    source: Path, destination: Path, model: ReleasedModel, iteration: int, num_steps: int
) -> None:
    """Write a checkpoint ``num_steps`` steps before ``iteration`` with the weights of that.

    Args:
        source: weights of ``iteration``, checked.
        destination: becomes a directory like a ``save``.
        model: with the configuration that the warm-up runs.
        iteration: the step that is begun from afterwards.
        num_steps: batches before it that moments will be made of.
    """
    downloaded = open_downloaded(source, model.settings, iteration=iteration)
    first = iteration - num_steps
    with new_directory(destination, "convert") as temporary:
        directory = temporary / f"global_step{first}"
        (directory / "configs").mkdir(parents=True)
        for name, text in model.config.config_files.items():
            write_atomically(directory / "configs" / name, text)
        counters = Counters(first, first, adam_step=0)
        dtype = _fits([measure_all(downloaded)], model)
        write_start(downloaded, directory, model, counters, moments=None, dtype=dtype)
        write_latest(temporary, first)


def import_with_moments_of(
    neox: Path, source: Path, destination: Path, model: ReleasedModel, step: int
) -> Imported:
    """Write the checkpoint of NeoX's in ``neox``, once its weights are found to be ``source``'s.

    Raises:
        CheckpointError: as :func:`import_step`; or the weights differ, or ``neox`` has no
            optimizer state.
    """
    iteration = model.iteration(step)
    theirs = open_downloaded(neox, model.settings, iteration=iteration)
    if theirs.stored is None or not has_optimizer(theirs.stored):
        raise CheckpointError(f"{neox} holds no optimizer state to take moments from")
    require_good(source, model, step)
    _require_same_weights(open_downloaded(source, model.settings, iteration=iteration), theirs)
    return import_step(neox, destination, model, step)


def require_no_moments(source: Path, model: ReleasedModel, step: int) -> None:
    """Refuse NeoX's files with optimizer state where other moments are asked for.

    Raises:
        ConfigError: it has some.
    """
    stored = open_downloaded(source, model.settings, iteration=model.iteration(step)).stored
    if stored is not None and has_optimizer(stored):
        raise ConfigError(f"{source} has moments of its own; leave --moments out to take them")


def require_good(
    source: Path,
    model: ReleasedModel,
    step: int,
    *,
    keep: Callable[[Measurements], None] = lambda measured: None,
) -> list[Finding]:
    """Check a download; return what was found.

    Args:
        source: the download.
        model: what it should be.
        step: as branches count.
        keep: given what was measured of its tensors.

    Raises:
        CheckpointError: its content proves it wrong, or something can't be read.
    """
    findings = check_release(source, model, step, keep=keep)
    for kind, what in (("wrong", "is not"), ("unknown", "could not be checked as")):
        reasons = [finding.text for finding in findings if finding.kind == kind]
        if reasons:
            raise CheckpointError(
                f"{source} {what} {model.name} step {step}: {'; '.join(reasons)}. Nothing was "
                "written"
            )
    return findings


def _require_same_weights(one: Downloaded, other: Downloaded) -> None:
    mine, theirs = measure_all(one), measure_all(other)
    matrices = [place for place, measured in mine.items() if measured.is_matrix]
    different = [
        place
        for place in matrices
        if place not in theirs or theirs[place].digest != mine[place].digest
    ]
    if different:
        layer, name = different[0]
        raise CheckpointError(
            f"{other.path} has other weights than {one.path}: {len(different)} of {len(matrices)} "
            f"matrices differ, layer {layer}'s {name} first; the moments are another step's"
        )


def _stored_count(stored: StoredCheckpoint, iteration: int) -> int:
    scheduler = stored.model_states(stored.model_ranks[0]).get("lr_scheduler")
    count = scheduler.get("num_iters") if isinstance(scheduler, Mapping) else None
    return count if isinstance(count, int) else iteration


def _fits(kept: Sequence[Measurements], model: ReleasedModel) -> torch.dtype | None:
    """Return the type the run was trained in if it holds every value, else None: as stored."""
    trained = model.training_dtype
    if trained == "fp32":
        return DTYPES["fp32"]
    fits = all(trained in one.exact_in for measured in kept for one in measured.values())
    return DTYPES[trained] if fits and kept else None
