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
from megatron.checkpoint.hugging_face.model_files import stored_model
from megatron.checkpoint.hugging_face.names import (
    TensorKey,
    hub_names,
    is_counted_often,
    whole_shapes,
)
from megatron.checkpoint.hugging_face.new_directory import Converted, new_directory
from megatron.checkpoint.hugging_face.safetensors_file import write_safetensors
from megatron.checkpoint.hugging_face.tokenizer_files import copy_to_hub
from megatron.checkpoint.hugging_face.values import ValueWatch, row_pieces
from megatron.checkpoint.hugging_face.weight_files import INDEX_SUFFIX, SAFETENSORS, listed
from megatron.checkpoint.reshape.mapped_pages import MappedPages
from megatron.checkpoint.reshape.streamed_file import StreamedTensor
from megatron.checkpoint.stored import StoredCheckpoint, layer_file, model_states_file
from megatron.checkpoint.structure import checksum_problems, structural_problems
from megatron.checkpoint.weights import stored_shape
from megatron.config.run_config import RunConfig
from megatron.data.tokenizers import build_tokenizer
from megatron.ledger.manifest import digest_problems, quick_problems, read_manifest
from megatron.ledger.readers import reading
from megatron.model.settings import ModelSettings
from megatron.model.tp_layout import tensor_split

__all__ = ["ExportSettings", "export_model"]

_DTYPE_WORDS = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}
_VOCABULARY = ("word_embeddings.weight", "final_linear.weight")
_RELEASE_BYTES = 32 << 20


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
        new_directory(destination) as directory,
        _checked_meanwhile(checkpoint),
    ):
        exported = _Export(
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


class _Export:
    """The weights of a checkpoint by Hugging Face's names."""

    def __init__(
        self,
        stored: StoredCheckpoint,
        settings: ModelSettings,
        rows: int,
        dtype: torch.dtype | None,
    ) -> None:
        self._stored = stored
        self._settings = settings
        self._rows = rows
        self._size = stored.tensor_parallel_size
        self._pages = MappedPages(stored.directory)
        self._read_bytes = 0
        self._differing: list[str] = []
        self._names = hub_names(settings)
        self._shapes = whole_shapes(settings)
        self._check()
        _, embedding = stored.weights(0, 0)
        self.dtype = dtype or embedding["word_embeddings.weight"].dtype
        self._watch = ValueWatch(self.dtype)

    def tensors(self) -> dict[str, StreamedTensor]:
        """Return what is written, in the order of the layers."""
        return {self._names[key]: self._tensor(key, shape) for key, shape in self._shapes.items()}

    def notices(self) -> Iterator[str]:
        """Yield what a user should know of the values; known once they were written."""
        yield from self._watch.notices()
        if self._differing:
            yield (
                f"copies of {listed(self._differing)} differ between tensor ranks; their mean was "
                "taken, and where they are counted once per rank their sum"
            )

    def _check(self) -> None:
        """Compare names and shapes with the configuration's."""
        stored, settings = self._stored, self._settings
        wanted: dict[int, set[str]] = {}
        for layer, name in self._shapes:
            wanted.setdefault(layer, set()).add(name)
        if stored.layer_numbers != sorted(wanted):
            tied = " with a tied embedding" if settings.tied_embedding else ""
            raise CheckpointError(
                f"{stored.directory} holds the layers {_ranges(stored.layer_numbers)}, but a model "
                f"of {settings.num_layers} blocks{tied} has {_ranges(sorted(wanted))}: it isn't "
                "the configuration's"
            )
        for layer, names in wanted.items():
            for rank in range(self._size):
                path, tensors = stored.weights(layer, rank)
                if different := sorted(names ^ set(tensors)):
                    raise CheckpointError(
                        f"{path}: layer {layer} is not the one that the configuration describes: "
                        f"{listed(different)} missing or unexpected"
                    )
                for name in names:
                    shape = stored_shape(name, self._shapes[layer, name], settings, self._size)
                    if tuple(tensors[name].shape) != shape:
                        raise CheckpointError(
                            f"{path}: {name} of layer {layer} has shape "
                            f"{tuple(tensors[name].shape)}, but the configuration's model needs "
                            f"{shape} on each of {self._size} tensor ranks"
                        )

    def _tensor(self, key: TensorKey, shape: tuple[int, ...]) -> StreamedTensor:
        if key[1] in _VOCABULARY:
            shape = (self._rows, *shape[1:])
        return StreamedTensor(shape, self.dtype, lambda: self._pieces(key, shape))

    def _pieces(self, key: TensorKey, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        layer, name = key
        files = [self._stored.weights(layer, rank) for rank in range(self._size)]
        parts = [tensors[name] for _, tensors in files]
        where = f"{files[0][0]}: {name}"
        dim = tensor_split(name, self._settings).dim
        if dim is None:
            often = is_counted_often(name, self._settings)
            times = self._settings.tp_bias_multiplicity if often else 1
            yield self._watch.pass_on(self._one_of(name, layer, parts), where=where, times=times)
        elif dim == 0:
            left = shape[0]
            for (path, _), part in zip(files, parts, strict=True):
                for piece in row_pieces(part[:left]):
                    yield self._watch.pass_on(piece, where=f"{path}: {name}")
                    self._count(piece)
                left -= min(left, len(part))
        else:
            for pieces in zip(*map(row_pieces, parts), strict=True):
                whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
                yield self._watch.pass_on(whole, where=where)
                for piece in pieces:
                    self._count(piece)

    def _one_of(self, name: str, layer: int, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what the tensor ranks' copies stand for: each of them, unless they came apart."""
        if all(torch.equal(part, parts[0]) for part in parts[1:]):
            return parts[0]
        self._differing.append(f"{name} of layer {layer}")
        return torch.stack([part.double() for part in parts]).mean(dim=0).to(parts[0].dtype)

    def _count(self, piece: torch.Tensor) -> None:
        self._read_bytes += piece.numel() * piece.element_size()
        if self._read_bytes >= _RELEASE_BYTES:
            self._read_bytes = 0
            self._pages.release()


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


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
