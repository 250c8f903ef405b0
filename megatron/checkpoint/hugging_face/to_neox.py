"""A Hugging Face model as a checkpoint that a run can start from: weights alone.

<save>/latest
<save>/tokenizer/           what the source has of its tokenizer
<save>/global_stepN/        layer files, or a sequential module's mp_rank files
    configs/*.yml           the configuration files named, or else
    model.yml               the keys that describe the model
    ledger.json             the facts that stay the model's at any topology
    manifest.json
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import CheckpointError, ConfigError
from megatron.checkpoint.hugging_face.architecture import (
    Architecture,
    neox_keys,
)
from megatron.checkpoint.hugging_face.converted import Converted, seal_checkpoint
from megatron.checkpoint.hugging_face.hub_model import HubModel, open_hub_model
from megatron.checkpoint.hugging_face.model_files import load_model_config
from megatron.checkpoint.hugging_face.tokenizer_files import TOKENIZER_JSON, copy_from_hub
from megatron.checkpoint.hugging_face.values import ValueWatch
from megatron.checkpoint.new_directory import new_directory
from megatron.checkpoint.reshape.streamed_file import write_streamed_file
from megatron.checkpoint.stored import LEDGER_FILE, layer_file, model_states_file
from megatron.config.run_config import RunConfig
from megatron.data.tokenizers import Tokenizer, build_tokenizer
from megatron.ledger.ledger_file import ModelPart
from megatron.ledger.manifest import StoredFile
from megatron.ledger.run_directory import write_latest
from megatron.model.facts import ModelFacts
from megatron.model.settings import ModelSettings

__all__ = ["ImportSettings", "import_model", "write_layer_files"]

_MAY_DIFFER = (
    "activation",  # said, since Pythia's config.json says another than it was trained with
    "seq_length",
    "padded_vocab_size",
    "tp_bias_multiplicity",
    "rotary_angles",
    "position_offset",
    "hidden_dropout",
    "attention_dropout",
    "init_method",
    "output_layer_init_method",
    "init_method_std",
)


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """What is written."""

    tensor_parallel_size: int
    step: int = 0
    uses_pipeline_engine: bool = True  # False: as a sequential module, pipe_parallel_size 0
    bias_multiplicity: int | None = None  # None: the configuration's key, else 1
    dtype: torch.dtype | None = None  # None: the source's
    config_files: Sequence[Path] = ()


def import_model(source: Path, destination: Path, settings: ImportSettings) -> Converted:
    """Write a Hugging Face model as a checkpoint of ours into a new directory.

    Args:
        source: a directory laid out as on the hub.
        destination: becomes a directory like a ``save``.
        settings: step, topology and type.

    Raises:
        CheckpointError: the source is damaged or no model we know, or the destination exists or
            can't be written; nothing is left behind.
        ConfigError: the model can't be divided so, or isn't the configuration's.
    """
    config = load_model_config(settings.config_files) if settings.config_files else None
    multiplicity = _multiplicity(settings, config)
    model = open_hub_model(source, bias_multiplicity=multiplicity)
    model.settings.require_divisible(settings.tensor_parallel_size)
    notices = list(_compared(model.architecture, config, source))
    with new_directory(destination, "convert") as temporary:
        tokenizer = copy_from_hub(source, temporary / "tokenizer")
        _require_rows(model.settings, tokenizer, str(source / TOKENIZER_JSON))
        _require_rows(model.settings, *_configured_tokenizer(config))
        directory = temporary / f"global_step{settings.step}"
        directory.mkdir()
        watch = ValueWatch(settings.dtype)
        if settings.uses_pipeline_engine:
            size = settings.tensor_parallel_size
            files = write_layer_files(model, directory, tensor_parallel_size=size, watch=watch)
        else:
            files = _write_sequential(model, directory, settings, watch)
        tokenizer_file = None
        if tokenizer is not None:
            tokenizer_file = destination.resolve() / "tokenizer" / TOKENIZER_JSON
        _write_description(model, directory, settings.tensor_parallel_size, config, tokenizer_file)
        seal_checkpoint(directory, settings.step, files)
        write_latest(temporary, settings.step)
    if tokenizer is None:
        notices.append(f"{source} holds no {TOKENIZER_JSON}; name the tokenizer in the run's keys")
    notices += watch.notices()
    if multiplicity > 1:
        notices.append(
            f"biases of attention.dense and mlp.linear2 are divided by {multiplicity}, and runs "
            "from here count them so often: tp_bias_multiplicity"
        )
    return Converted(
        destination / directory.name,
        len(files),
        sum(file.size for file in files.values()),
        tuple(notices),
    )


def write_layer_files(
    model: HubModel, directory: Path, *, tensor_parallel_size: int, watch: ValueWatch
) -> dict[str, StoredFile]:
    """Write a model's layer files; return each with its size and digest.

    Raises:
        CheckpointError: a value isn't finite, or the disk refused.
    """
    layers: dict[int, list[str]] = {}
    for layer, name in model.shapes:
        layers.setdefault(layer, []).append(name)
    files = {}
    for layer, names in layers.items():
        for rank in range(tensor_parallel_size):
            parts = OrderedDict(
                (name, model.part(layer, name, size=tensor_parallel_size, rank=rank, watch=watch))
                for name in names
            )
            file = layer_file(layer, rank)
            files[file] = write_streamed_file(parts, directory / file)
        model.weights.release()
    return files


def _multiplicity(settings: ImportSettings, config: RunConfig | None) -> int:
    configured = None if config is None else config.ledger.tp_bias_multiplicity
    wanted = settings.bias_multiplicity
    if wanted is not None and configured not in (None, wanted):
        raise ConfigError(
            f"tp_bias_multiplicity is {configured} in the configuration and {wanted} is asked for"
        )
    return wanted or configured or 1


def _compared(architecture: Architecture, config: RunConfig | None, source: Path) -> Iterator[str]:
    """Yield what differs without harm.

    Raises:
        ConfigError: the configuration describes another model.
    """
    theirs = architecture.settings
    tanh = (
        "config.json says hidden_act: {}, which is erf's GELU. Pythia was trained with tanh's: "
        "bias_gelu_fusion: true goes on as it was trained, false computes what transformers does"
    )
    if config is None:
        if theirs.activation == "gelu":
            yield tanh.format("gelu")
        return
    facts = ModelFacts(theirs.padded_vocab_size, theirs.tp_bias_multiplicity)
    ours = ModelSettings.from_config(config.model, config.training, facts)
    different = [
        f"{field.name} is {getattr(theirs, field.name)!r} in {source / 'config.json'} and "
        f"{getattr(ours, field.name)!r} in the configuration"
        for field in fields(ModelSettings)
        if field.name not in _MAY_DIFFER
        and getattr(theirs, field.name) != getattr(ours, field.name)
    ]
    if ours.is_gated:
        different.append(f"activation is {ours.activation!r} in the configuration")
    if different:
        raise ConfigError(*(f"another model: {one}" for one in different))
    if ours.activation != theirs.activation:
        yield (
            tanh.format("gelu")
            if theirs.activation == "gelu"
            else (
                "config.json's hidden_act is tanh's GELU, and the configuration computes erf's: "
                "set bias_gelu_fusion: true"
            )
        )


def _configured_tokenizer(config: RunConfig | None) -> tuple[Tokenizer | None, str]:
    """Return the configuration's tokenizer, if its files are here."""
    file = None if config is None else config.training.vocab_file
    if config is None or file is None or not Path(file).exists():
        return None, ""
    kind = config.tokenizer.tokenizer_type
    return build_tokenizer(kind, file, config.training.merge_file), file


def _require_rows(settings: ModelSettings, tokenizer: Tokenizer | None, source: str) -> None:
    rows = settings.padded_vocab_size
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"{source} has {tokenizer.vocab_size} entries, but the model's embedding has {rows} "
            "rows: it is another model's tokenizer"
        )


def _write_sequential(
    model: HubModel, directory: Path, settings: ImportSettings, watch: ValueWatch
) -> dict[str, StoredFile]:
    files = {}
    size = settings.tensor_parallel_size
    for rank in range(size):
        module = OrderedDict(
            (
                f"sequential.{layer}.{name}",
                model.part(layer, name, size=size, rank=rank, watch=watch),
            )
            for layer, name in model.shapes
        )
        name = model_states_file(rank)
        content = {"module": module, **_metadata(model.settings, settings)}
        files[name] = write_streamed_file(content, directory / name)
    return files


def _metadata(model: ModelSettings, settings: ImportSettings) -> dict[str, Any]:
    return {
        "optimizer": None,
        "iteration": settings.step,
        "dp_world_size": 1,
        "mp_world_size": settings.tensor_parallel_size,
        "args": {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "max_position_embeddings": model.max_position_embeddings,
            "padded_vocab_size": model.padded_vocab_size,
            "model_parallel_size": settings.tensor_parallel_size,
        },
        "reshaped_from": {},  # there are no random states, and that is as it should be
    }


def _write_description(
    model: HubModel,
    directory: Path,
    size: int,
    config: RunConfig | None,
    tokenizer_file: Path | None,
) -> None:
    """Write what isn't tensors: configuration and pinned facts."""
    if config is not None:
        (directory / "configs").mkdir()
        for name, text in config.config_files.items():
            write_atomically(directory / "configs" / name, text)
    else:
        keys = neox_keys(model.architecture)
        if tokenizer_file is not None:
            keys |= {"tokenizer_type": "HFTokenizer", "vocab_file": str(tokenizer_file)}
        write_atomically(directory / "model.yml", yaml.safe_dump(keys, sort_keys=False))
    facts = ModelPart(
        padded_vocab_size=model.settings.padded_vocab_size,
        tp_bias_multiplicity=model.settings.tp_bias_multiplicity,
        tensor_parallel_size=size,
    )
    text = json.dumps({"model": asdict(facts)}, indent=2) + "\n"
    write_atomically(directory / LEDGER_FILE, text)
