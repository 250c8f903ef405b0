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

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron.base.atomic_files import fsync_directory, write_atomically
from megatron.base.errors import CheckpointError, ConfigError
from megatron.base.file_digests import digest_file
from megatron.checkpoint.hugging_face.hub_model import open_hub_model
from megatron.checkpoint.hugging_face.to_neox import write_layer_files
from megatron.checkpoint.hugging_face.tokenizer_files import copy_from_hub
from megatron.checkpoint.hugging_face.values import DTYPES, ValueWatch
from megatron.checkpoint.new_directory import new_directory
from megatron.checkpoint.reshape.streamed_file import StreamedTensor, write_streamed_file
from megatron.checkpoint.stored import LEDGER_FILE, StoredCheckpoint, model_states_file
from megatron.checkpoint.weights import stored_shape
from megatron.cli.pythia.checks import check_release, measure_all
from megatron.cli.pythia.comparison import Measurements
from megatron.cli.pythia.downloaded import Downloaded, Place, open_downloaded
from megatron.cli.pythia.file_checks import has_optimizer
from megatron.cli.pythia.findings import Finding
from megatron.cli.pythia.models import ReleasedModel, schedule_of
from megatron.ledger.ledger_file import ModelPart
from megatron.ledger.manifest import Manifest, StoredFile, write_manifest
from megatron.ledger.run_directory import write_latest
from megatron.optim.param_groups import decays_by_name

__all__ = [
    "Imported",
    "Moments",
    "import_step",
    "import_with_moments_of",
    "require_good",
    "require_no_moments",
    "write_start_of_warm_up",
]

# In a model-states file: where Adam's moments are from, for the plan of a launch.
MOMENTS_NOTE = "moments"
_DUMMY_STEPS = 1  # v1.0's optimizers step once, on zero gradients, when they are made (§5.3)
Moments = Mapping[str, Any]
"""``exp_avg`` and ``exp_avg_sq``: function of tensor rank, layer and name, giving the values."""


@dataclass(frozen=True)
class Counters:
    """How far everything that counts has come."""

    iteration: int  # steps done
    updates: int  # without those that fp16 skipped; the learning rate's step
    adam_step: int

    @classmethod
    def of(cls, model: ReleasedModel, iteration: int, skipped_steps: int) -> "Counters":
        """Return those of an undisturbed run."""
        if not 0 <= skipped_steps <= iteration:
            raise ConfigError(
                f"--skipped-steps {skipped_steps}: of {iteration} steps so many can't have "
                "overflowed"
            )
        updates = iteration - skipped_steps
        is_wrapped = model.training_dtype != "fp32" or model.config.get("zero_stage")
        is_v1 = model.config.ledger.neox_version == "v1.0"
        return cls(iteration, updates, updates + (_DUMMY_STEPS if is_v1 and is_wrapped else 0))


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
            notices = _take_as_it_is(stored, directory)
            adam_step = None
            learning_rate_step = _stored_count(stored, iteration)
        else:
            counters = Counters.of(model, iteration, skipped_steps)
            learning_rate_step, adam_step = counters.updates, counters.adam_step
            notices = _write(
                downloaded,
                directory,
                temporary,
                model,
                counters,
                moments,
                _fits(kept, model),
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
        kept = [measure_all(downloaded)]
        _write(downloaded, directory, temporary, model, counters, None, _fits(kept, model))
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


def _take_as_it_is(stored: StoredCheckpoint, directory: Path) -> list[str]:
    """Link, or copy, NeoX's files: their reader gives masters and moments exactly."""
    copied = 0
    for path in sorted(stored.directory.iterdir()):
        if path.suffix != ".pt":
            continue
        real = path.resolve()  # the hub's cache has links
        try:
            os.link(real, directory / path.name)
        except OSError:
            shutil.copyfile(real, directory / path.name)
            copied += 1
    fsync_directory(directory)
    how = "copied" if copied else "linked, so that they take no room twice"
    return [f"weights, masters, moments and loss scale are those of {stored.directory}, {how}"]


def _stored_count(stored: StoredCheckpoint, iteration: int) -> int:
    scheduler = stored.model_states(stored.model_ranks[0]).get("lr_scheduler")
    count = scheduler.get("num_iters") if isinstance(scheduler, Mapping) else None
    return count if isinstance(count, int) else iteration


def _write(
    downloaded: Downloaded,
    directory: Path,
    temporary: Path,
    model: ReleasedModel,
    counters: Counters,
    moments: Moments | None,
    dtype: torch.dtype | None,
) -> list[str]:
    """Write weights, metadata and facts; return what a user should know."""
    multiplicity = model.settings.tp_bias_multiplicity
    notices: list[str] = []
    if downloaded.stored is None:
        size = model.tensor_parallel_size
        hub = open_hub_model(downloaded.path, bias_multiplicity=multiplicity)
        hub.settings.require_divisible(size)
        watch = ValueWatch(dtype)
        files = write_layer_files(hub, directory, tensor_parallel_size=size, watch=watch)
        notices += watch.notices()
        if copy_from_hub(downloaded.path, temporary / "tokenizer") is None:
            notices.append("no tokenizer came with it")
        shapes = hub.shapes
    else:
        size = downloaded.stored.tensor_parallel_size
        notices += _take_as_it_is(downloaded.stored, directory)
        for path in directory.glob("mp_rank_*"):
            path.unlink()
        files = {}
        shapes = downloaded.shapes
    for rank in range(size):
        content = _metadata(model, size, counters, downloaded.vocabulary)
        content[MOMENTS_NOTE] = "zeros (cold)" if moments is None else "rebuilt from batches (warm)"
        content["optimizer"] = _optimizer(model, shapes, size, rank, counters, moments)
        name = model_states_file(rank)
        files[name] = write_streamed_file(content, directory / name)
    facts = ModelPart(
        padded_vocab_size=downloaded.vocabulary,
        tp_bias_multiplicity=multiplicity,
        tensor_parallel_size=size,
    )
    text = json.dumps({"model": asdict(facts)}, indent=2) + "\n"
    write_atomically(directory / LEDGER_FILE, text)
    _seal(directory, counters.iteration, files)
    if moments is None:
        notices.append(
            "Adam's moments begin as zeros (cold): the first updates are larger than the run's were"
        )
    notices.append(
        "weights don't say how many fp16 steps overflowed: the learning rate is that of no skipped "
        "step unless you gave the number, and the loss scale begins anew"
    )
    return notices


def _fits(kept: Sequence[Measurements], model: ReleasedModel) -> torch.dtype | None:
    """Return the type the run was trained in if it holds every value, else None: as stored."""
    trained = model.training_dtype
    if trained == "fp32":
        return DTYPES["fp32"]
    fits = all(trained in one.exact_in for measured in kept for one in measured.values())
    return DTYPES[trained] if fits and kept else None


def _metadata(
    model: ReleasedModel, size: int, counters: Counters, vocabulary: int
) -> dict[str, Any]:
    config = model.config
    batch = config.geometry.global_batch_size
    schedule = schedule_of(config).schedule()
    return {
        "module": None,
        "iteration": counters.iteration,
        "global_steps": counters.iteration,
        "global_samples": counters.iteration * batch,
        "skipped_steps": counters.iteration - counters.updates,
        "lr_scheduler": {
            "start_lr": schedule.start_lr,
            "warmup_iter": schedule.warmup_iter,
            "num_iters": counters.updates,
            "decay_style": schedule.decay_style,
            "end_iter": schedule.end_iter,
            "min_lr": schedule.min_lr,
        },
        # as one data-parallel rank would have taken the run's batches
        "dp_world_size": 1,
        "mp_world_size": size,
        "ds_config": {
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": batch,
            "gradient_accumulation_steps": 1,
        },
        "args": {
            "num_layers": config.model.num_layers,
            "hidden_size": config.model.hidden_size,
            "num_attention_heads": config.model.num_attention_heads,
            "max_position_embeddings": config.model.max_position_embeddings,
            "make_vocab_size_divisible_by": config.model.make_vocab_size_divisible_by,
            "padded_vocab_size": vocabulary,
            "tokenizer_type": config.tokenizer.tokenizer_type,
            "model_parallel_size": size,
        },
        "reshaped_from": {},  # there are no random states, and that is as it should be
    }


def _optimizer(
    model: ReleasedModel,
    shapes: Mapping[Place, tuple[int, ...]],
    size: int,
    rank: int,
    counters: Counters,
    moments: Moments | None,
) -> dict[str, Any]:
    """Return the state of a plain Adam, whose masters are the weights.

    Without moments its entries are left out, which readers take for zeros; a plain optimizer of a
    run in fp32 needs them, for it keeps its step with them.
    """
    decaying = [place for place in shapes if decays_by_name(place[1])]
    others = [place for place in shapes if not decays_by_name(place[1])]
    config = model.config
    options = (config.deepspeed.optimizer or {}).get("params", {})
    adam = {
        "lr": schedule_of(config).schedule().at(counters.updates),
        "betas": list(options.get("betas", (0.9, 0.999))),
        "eps": options.get("eps", 1e-8),
        "bias_correction": True,
        "step": counters.adam_step,
    }
    decay = config.training.weight_decay
    groups = []
    if decay:
        groups.append(("weight_decay_params", decay, decaying))
        groups.append(("no_weight_decay_params", 0.0, others))
    else:
        groups.append(("no_weight_decay_params", 0.0, list(shapes)))
    vocabulary = shapes[0, "word_embeddings.weight"][0]
    settings = replace(model.settings, padded_vocab_size=vocabulary)
    entries: dict[int, Any] = {}
    param_groups = []
    number = 0
    for name, weight_decay, places in groups:
        numbers = list(range(number, number + len(places)))
        number += len(places)
        param_groups.append({**adam, "weight_decay": weight_decay, "name": name, "params": numbers})
        if moments is None and (model.training_dtype != "fp32" or not counters.adam_step):
            continue
        for index, place in zip(numbers, places, strict=True):
            local = stored_shape(place[1], shapes[place], settings, size)
            entries[index] = {
                "step": counters.adam_step,
                **{
                    kind: _values(moments, kind, place, rank, local)
                    for kind in ("exp_avg", "exp_avg_sq")
                },
            }
    return {"state": entries, "param_groups": param_groups}


def _values(
    moments: Moments | None, kind: str, place: Place, rank: int, shape: tuple[int, ...]
) -> StreamedTensor:
    if moments is None:
        return StreamedTensor(shape, torch.float32, lambda: [torch.zeros(shape)])
    read = moments[kind]
    return StreamedTensor(shape, torch.float32, lambda: [read(rank, *place)])


def _seal(directory: Path, step: int, files: dict[str, StoredFile]) -> None:
    """Write the manifest of all files; those not in ``files`` are read for their digests."""
    for path in sorted(_files(directory)):
        name = path.relative_to(directory).as_posix()
        if name not in files:
            files[name] = StoredFile(path.stat().st_size, digest_file(path))
    manifest = Manifest(sequence=1, step=step, run_id=None, attempt=None, parent=None, files=files)
    write_manifest(directory, manifest)
    fsync_directory(directory)


def _files(directory: Path) -> Iterable[Path]:
    return (path for path in directory.rglob("*") if path.is_file())
