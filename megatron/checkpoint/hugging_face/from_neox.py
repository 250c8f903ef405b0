"""A checkpoint of ours or NeoX's as a Hugging Face model, whatever its topology.

Biases that were counted once per tensor rank are written as often as they count; NeoX v1.0 kept
a copy on every rank, whose sum that is.
"""

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.base.errors import CheckpointError, ConfigError, MegatronError
from megatron.checkpoint.hugging_face.architecture import HIDDEN_ACTS, hub_config
from megatron.checkpoint.hugging_face.converted import Converted
from megatron.checkpoint.hugging_face.exported_weights import ExportedWeights
from megatron.checkpoint.hugging_face.model_files import stored_model
from megatron.checkpoint.hugging_face.safetensors_file import write_safetensors
from megatron.checkpoint.hugging_face.tokenizer_files import copy_to_hub
from megatron.checkpoint.hugging_face.weight_files import INDEX_SUFFIX, SAFETENSORS
from megatron.checkpoint.new_directory import new_directory
from megatron.checkpoint.reshape.streamed_file import StreamedTensor
from megatron.checkpoint.stored import StoredCheckpoint, layer_file, model_states_file
from megatron.checkpoint.structure import checksum_problems, structural_problems
from megatron.config.run_config import RunConfig
from megatron.data.tokenizers import build_tokenizer
from megatron.ledger.manifest import digest_problems, quick_problems, read_manifest
from megatron.ledger.readers import reading
from megatron.model.settings import ModelSettings

__all__ = ["ExportSettings", "export_model"]

_DTYPE_WORDS = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What is written."""

    dtype: torch.dtype | None = None  # None: the checkpoint's
    vocab_size: int | None = None
    """Rows of the vocabulary; None: all that were trained, those beyond the tokenizer's too."""

    cuts_padding: bool = False  # as many rows as the configuration's tokenizer has entries
    hidden_act: str | None = None  # None: what computes as the configuration does
    pad_token_id: int | None = None
    copies_tokenizer: bool = True
    max_shard_bytes: int = 5_000_000_000
    config_files: Sequence[Path] = ()


def export_model(checkpoint: Path, destination: Path, settings: ExportSettings) -> Converted:
    """Write a checkpoint's weights as ``GPTNeoXForCausalLM`` into a new directory.

    Args:
        checkpoint: a ``global_stepN``, or a directory with such files.
        destination: gets ``config.json``, safetensors and the tokenizer's files.
        settings: what is written.

    Raises:
        CheckpointError: the checkpoint is damaged or isn't its configuration's model, or the
            destination exists or can't be written; nothing is left behind.
        ConfigError: the model can't be expressed.
    """
    config, model = stored_model(checkpoint, settings.config_files)
    rows = _rows(config, model, settings)
    end_of_document, notices = _end_of_document(config, model)
    if settings.hidden_act not in (None, *HIDDEN_ACTS):
        raise ConfigError(f"hidden_act {settings.hidden_act!r} is none of {', '.join(HIDDEN_ACTS)}")
    with (
        reading(checkpoint),
        new_directory(destination, "convert") as directory,
        _checked_meanwhile(checkpoint),
    ):
        exported = ExportedWeights(
            StoredCheckpoint(checkpoint, is_verified=True), model, rows, settings.dtype
        )
        description = hub_config(
            model,
            vocab_size=rows,
            dtype=_DTYPE_WORDS[exported.dtype],
            init_std=config.model.init_method_std,
            end_of_document=end_of_document,
            hidden_act=settings.hidden_act,
        )
        if settings.pad_token_id is not None:
            description["pad_token_id"] = settings.pad_token_id
        (directory / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        _write_shards(exported.tensors(), directory, settings.max_shard_bytes)
        if settings.copies_tokenizer:
            training = config.training
            notices += copy_to_hub(
                config.tokenizer.tokenizer_type,
                training.vocab_file,
                training.merge_file,
                directory,
            )
        files = [path.stat().st_size for path in directory.iterdir()]
    notices += exported.notices()
    notices += _numeric_notices(model, rows, description["hidden_act"])
    return Converted(destination, len(files), sum(files), tuple(notices))


def _rows(config: RunConfig, model: ModelSettings, settings: ExportSettings) -> int:
    rows = settings.vocab_size or model.padded_vocab_size
    if settings.cuts_padding and settings.vocab_size is None:
        training = config.training
        rows = build_tokenizer(
            config.tokenizer.tokenizer_type, training.vocab_file, training.merge_file
        ).vocab_size
    if rows > model.padded_vocab_size:
        raise ConfigError(
            f"{rows} rows of the vocabulary are asked for, but the model has "
            f"{model.padded_vocab_size}: it is another model's tokenizer"
        )
    return rows


def _end_of_document(config: RunConfig, model: ModelSettings) -> tuple[int | None, list[str]]:
    """Return the id of the tokenizer's end of a document, if its files are here.

    Raises:
        ConfigError: the tokenizer is another model's.
    """
    training = config.training
    kind = config.tokenizer.tokenizer_type
    try:
        tokenizer = build_tokenizer(kind, training.vocab_file, training.merge_file)
    except (ConfigError, OSError, ValueError) as error:
        return None, [
            f"the tokenizer can't be opened ({str(error).splitlines()[0]}): config.json says "
            "bos_token_id: null and eos_token_id: null"
        ]
    if training.vocab_file and tokenizer.vocab_size > model.padded_vocab_size:
        raise ConfigError(
            f"{training.vocab_file} has {tokenizer.vocab_size} entries, but the model has "
            f"{model.padded_vocab_size} rows: it is another model's tokenizer"
        )
    return tokenizer.eod, []


@contextlib.contextmanager
def _checked_meanwhile(checkpoint: Path) -> Iterator[None]:
    """Compare the bytes of the files with weights, on a thread, with what was written.

    It reads ahead of the conversion, so that the disk is read once. The optimizer's files aren't
    looked at.

    Raises:
        CheckpointError: they differ; said in place of whatever followed from it.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        _require_none(checkpoint, structural_problems(checkpoint, needs_optimizer=False))
    else:
        _require_none(checkpoint, quick_problems(checkpoint, manifest))
    stored = StoredCheckpoint(checkpoint, is_verified=True)
    names = [layer_file(layer, rank) for layer, ranks in stored.layers.items() for rank in ranks]
    names = names or [*map(model_states_file, stored.model_ranks)]
    is_over = threading.Event()

    def problems() -> list[str]:
        left = itertools.takewhile(lambda _: not is_over.is_set(), sorted(names))
        if manifest is None:
            return checksum_problems(checkpoint, left)
        return digest_problems(checkpoint, manifest, left)

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(problems)
        try:
            yield
        except MegatronError:
            _require_none(checkpoint, found.result())
            raise
        except BaseException:
            is_over.set()
            raise
        _require_none(checkpoint, found.result())


def _require_none(checkpoint: Path, problems: Sequence[str]) -> None:
    if problems:
        raise CheckpointError(
            f"{checkpoint} is damaged, so nothing was written: {'; '.join(problems)}. Take another "
            "checkpoint"
        )


def _write_shards(tensors: dict[str, StreamedTensor], directory: Path, limit: int) -> None:
    """Write one file, or several of at most ``limit`` bytes (or one tensor) and their index."""
    shards: list[dict[str, StreamedTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.num_elements * tensor.dtype.itemsize
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    if len(shards) == 1:
        write_safetensors(directory / SAFETENSORS, shards[0])
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, shard)
        index |= dict.fromkeys(shard, file)
    sizes = [tensor.num_elements for tensor in tensors.values()]
    metadata = {
        "total_parameters": sum(sizes),
        "total_size": sum(
            count * tensor.dtype.itemsize
            for count, tensor in zip(sizes, tensors.values(), strict=True)
        ),
    }
    content = {"metadata": metadata, "weight_map": dict(sorted(index.items()))}
    path = directory / (SAFETENSORS + INDEX_SUFFIX)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _numeric_notices(model: ModelSettings, rows: int, hidden_act: str) -> Iterator[str]:
    if HIDDEN_ACTS[hidden_act] != model.activation:
        yield (
            f"hidden_act: {hidden_act} is another GELU than the configuration's "
            f"({model.activation}); logits differ a little"
        )
    elif model.activation == "gelu_tanh":
        yield (
            f"hidden_act is {hidden_act}, the GELU of bias_gelu_fusion: true. NeoX's own converter "
            "and the released Pythias say gelu: --hidden-act gelu writes that"
        )
    if model.gpt_j_residual and model.tp_bias_multiplicity > 1:
        yield (
            f"biases of attention.dense and mlp.linear2 are multiplied by "
            f"{model.tp_bias_multiplicity}, as often as the model counts them"
        )
    if model.rotary_angles != "float32":
        yield (
            "transformers computes rotary angles in float32; the model was trained with angles in "
            "its parameters' type, so logits differ a little"
        )
    if rows < model.padded_vocab_size:
        yield (
            f"{model.padded_vocab_size - rows} rows of padding were cut; they took part in the "
            "softmax while training, so losses come out a little lower"
        )
