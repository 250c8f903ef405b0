"""The files of a checkpoint that begins at weights: metadata and an Adam that has seen nothing."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron.base.atomic_files import fsync_directory, write_atomically
from megatron.base.errors import ConfigError
from megatron.checkpoint.hugging_face.converted import seal_checkpoint
from megatron.checkpoint.hugging_face.hub_model import open_hub_model
from megatron.checkpoint.hugging_face.to_neox import write_layer_files
from megatron.checkpoint.hugging_face.tokenizer_files import copy_from_hub
from megatron.checkpoint.hugging_face.values import ValueWatch
from megatron.checkpoint.reshape.streamed_file import StreamedTensor, write_streamed_file
from megatron.checkpoint.stored import LEDGER_FILE, StoredCheckpoint, model_states_file
from megatron.checkpoint.weights import stored_shape
from megatron.cli.pythia.downloaded import Downloaded, Place
from megatron.cli.pythia.models import ReleasedModel, schedule_of
from megatron.ledger.ledger_file import ModelPart
from megatron.optim.param_groups import decays_by_name

__all__ = ["Counters", "Moments", "take_as_it_is", "write_start"]

# In a model-states file: where Adam's moments are from, for the plan of a launch.
_MOMENTS_NOTE = "moments"
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


def write_start(
    downloaded: Downloaded,
    directory: Path,
    model: ReleasedModel,
    counters: Counters,
    *,
    moments: Moments | None,
    dtype: torch.dtype | None,
) -> list[str]:
    """Write weights, metadata and facts into ``directory``, the tokenizer beside it.

    Args:
        downloaded: the weights.
        directory: a ``global_stepN`` of a new ``save``.
        model: what they are of.
        counters: how far the run has come.
        moments: of Adam; None: zeros.
        dtype: of the weights' files; None: as they are stored.

    Returns:
        What a user should know.
    """
    multiplicity = model.settings.tp_bias_multiplicity
    notices: list[str] = []
    if downloaded.stored is None:
        size = model.tensor_parallel_size
        hub = open_hub_model(downloaded.path, bias_multiplicity=multiplicity)
        hub.settings.require_divisible(size)
        watch = ValueWatch(dtype)
        files = write_layer_files(hub, directory, tensor_parallel_size=size, watch=watch)
        notices += watch.notices()
        if copy_from_hub(downloaded.path, directory.parent / "tokenizer") is None:
            notices.append("no tokenizer came with it")
        shapes = hub.shapes
    else:
        size = downloaded.stored.tensor_parallel_size
        notices += take_as_it_is(downloaded.stored, directory)
        for path in directory.glob("mp_rank_*"):
            path.unlink()
        files = {}
        shapes = downloaded.shapes
    for rank in range(size):
        content = _metadata(model, size, counters, downloaded.vocabulary)
        content[_MOMENTS_NOTE] = (
            "zeros (cold)" if moments is None else "rebuilt from batches (warm)"
        )
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
    seal_checkpoint(directory, counters.iteration, files)
    if moments is None:
        notices.append(
            "Adam's moments begin as zeros (cold): the first updates are larger than the run's were"
        )
    notices.append(
        "weights don't say how many fp16 steps overflowed: the learning rate is that of no skipped "
        "step unless you gave the number, and the loss scale begins anew"
    )
    return notices


def take_as_it_is(stored: StoredCheckpoint, directory: Path) -> list[str]:
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
