"""What a checkpoint directory holds: which files, at which topology, written by whom.

layer_{LL}-model_{TT}-model_states.pt        weights of one layer, tensor rank TT (pipelines)
mp_rank_{XX}_model_states.pt                 metadata, scheduler, random states; XX = stage *
                                             tensor size + tensor rank. Without a pipeline also
                                             the weights, as sequential.{layer}.{name}
[bf16_]zero_pp_rank_{D}_mp_rank_{XX}_optim_states.pt     ZeRO's part of data-parallel rank D
configs/*.yml                                the configuration files, as written
ledger.json                                  ours only
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron.base.errors import CheckpointError
from megatron.base.regular_files import read_small_text
from megatron.checkpoint.safe_torch import read_torch_file
from megatron.checkpoint.stored_headers import is_parameter
from megatron.ledger.run_directory import step_of
from megatron.model.facts import ModelFacts

__all__ = [
    "LEDGER_FILE",
    "StoredCheckpoint",
    "StoredFacts",
    "current_name",
    "layer_file",
    "model_states_file",
    "read_model_facts",
    "zero_file",
]

LEDGER_FILE = "ledger.json"
_TEXT_LIMIT = 1 << 26
_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_MODEL_STATES_FILE = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_(\d+)_model_states\.pt")
_SCATTERED_FILE = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
# Older DeepSpeed versions leave out the last underscore but one.
_ZERO_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_SEQUENTIAL_NAME = re.compile(r"sequential\.(\d+)\.(.+)")

# Names of NeoX v1.0, Pythia and NeoX-20B, and buffers those files hold that are computed now.
_OLD_NAMES = {
    "mlp.dense_h_to_4h.": "mlp.linear1.",
    "mlp.dense_4h_to_h.": "mlp.linear2.",
}


def layer_file(layer: int, tensor_rank: int) -> str:
    """Return the name of the file with ``tensor_rank``'s part of ``layer``."""
    return f"layer_{layer:02d}-model_{tensor_rank:02d}-model_states.pt"


def model_states_file(model_rank: int) -> str:
    """Return the name of the metadata file of a stage's tensor rank."""
    return f"mp_rank_{model_rank:02d}_model_states.pt"


def zero_file(data_rank: int, model_rank: int, *, bf16: bool) -> str:
    """Return the name of the file with a data-parallel rank's part of the optimizer state."""
    prefix = "bf16_" if bf16 else ""
    return f"{prefix}zero_pp_rank_{data_rank}_mp_rank_{model_rank:02d}_optim_states.pt"


def current_name(name: str) -> str:
    """Return what a tensor is called now that a file calls ``name``."""
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


@dataclass(frozen=True)
class StoredFacts:
    """The pinned facts of a stored model and the tensor-parallel size of its files."""

    model: ModelFacts
    tensor_parallel_size: int


class StoredCheckpoint:
    """One ``global_stepN`` directory. Files are opened when asked for, and only once.

    Args:
        directory: the checkpoint.
        is_verified: its files' digests or checksums were just checked, so that opening one need
            not read it through.

    Raises:
        CheckpointError: it is not a checkpoint, or its files contradict each other.
    """

    def __init__(self, directory: Path, *, is_verified: bool = False) -> None:
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory")
        self.directory = directory
        self._is_verified = is_verified
        names = [entry.name for entry in directory.iterdir()]
        self.layers: dict[int, list[int]] = {}  # layer -> tensor ranks whose file exists
        for match in filter(None, map(_LAYER_FILE.fullmatch, names)):
            self.layers.setdefault(int(match[1]), []).append(int(match[2]))
        self.model_ranks = sorted(
            int(match[1]) for match in filter(None, map(_MODEL_STATES_FILE.fullmatch, names))
        )
        # (model rank, data-parallel rank) -> file with that rank's part of the optimizer state
        self.optimizer_files = {
            (int(match[2]), int(match[1])): match[0]
            for match in filter(None, map(_ZERO_FILE.fullmatch, names))
        }
        # By ZeRO 3: every data-parallel rank has a model-states file, with its part of the weights.
        self.is_scattered = any(map(_SCATTERED_FILE.fullmatch, names))
        if not (self.layers or self.model_ranks):
            raise CheckpointError(
                f"{directory} holds no layer_*.pt and no mp_rank_*.pt: it is not a checkpoint"
            )
        self._opened: dict[str, Any] = {}

    @property
    def is_ours(self) -> bool:
        """Whether this code wrote it (else NeoX did)."""
        return (self.directory / LEDGER_FILE).exists()

    @cached_property
    def is_v1(self) -> bool:
        """Whether NeoX v1.0 wrote it: its DeepSpeed stored no configuration yet."""
        if self.is_ours or not self.model_ranks:
            return False
        return not {"ds_config", "ds_version"} & set(self.model_states(self.model_ranks[0]))

    @property
    def has_layer_files(self) -> bool:
        """Whether a pipeline wrote it."""
        return bool(self.layers)

    @cached_property
    def layer_numbers(self) -> list[int]:
        """The layers with parameters, in order.

        Raises:
            CheckpointError: the weights are not named by layer.
        """
        if self.has_layer_files:
            return sorted(self.layers)
        return sorted(self._sequential_layers(0))

    @cached_property
    def num_stages(self) -> int:
        """Pipeline stages that wrote it; 1 for a sequential module."""
        tensor = self.tensor_parallel_size
        world = self.model_states(self.model_ranks[0]).get("mp_world_size", len(self.model_ranks))
        return max(1, world // tensor)

    @cached_property
    def tensor_parallel_size(self) -> int:
        """How many parts every divided tensor is in."""
        if self.layers:
            size = 1 + max(rank for ranks in self.layers.values() for rank in ranks)
            # The metadata knows about tensor ranks of which no file is left.
            return max(size, self._configured_size())
        return len(self.model_ranks)

    @cached_property
    def iteration(self) -> int:
        """The step this checkpoint was saved at.

        Raises:
            CheckpointError: the step inside is missing, or differs from the directory's name.
        """
        named = step_of(self.directory.name)
        if not self.model_ranks and named is not None:
            return named  # layer files alone, as of a converted model
        metadata = self.model_states(self.model_ranks[0])
        step = metadata.get("iteration", metadata.get("total_iters"))
        if not isinstance(step, int):
            raise CheckpointError(f"{self.directory}: its model states hold no iteration")
        if named is not None and step != named:
            raise CheckpointError(
                f"{self.directory} holds the checkpoint of step {step}: the directory was renamed, "
                "or its files come from another save"
            )
        return step

    @property
    def model_arguments(self) -> Mapping[str, Any]:
        """The eight values NeoX compares on load, empty if there is no metadata file."""
        if not self.model_ranks:
            return {}
        arguments = self.model_states(self.model_ranks[0]).get("args", {})
        return arguments if isinstance(arguments, Mapping) else {}

    def model_states(self, model_rank: int, data_rank: int = 0) -> dict[str, Any]:
        """Return the content of a metadata file; ZeRO 3 has one for each data-parallel rank.

        Raises:
            CheckpointError: it is missing, damaged or no dictionary.
        """
        prefix = f"zero_pp_rank_{data_rank}_" if self.is_scattered else ""
        return self._open(prefix + model_states_file(model_rank))

    def optimizer_states(self, name: str) -> dict[str, Any]:
        """Return the content of the ZeRO file called ``name``.

        Raises:
            CheckpointError: it is missing, damaged or no dictionary.
        """
        return self._open(name)

    def require_layer(self, layer: int) -> None:
        """Check that every tensor rank's part of ``layer`` is there.

        Raises:
            CheckpointError: names the missing files.
        """
        size = self.tensor_parallel_size
        missing = sorted(set(range(size)) - set(self.layers.get(layer, [])))
        if missing:
            paths = ", ".join(str(self.directory / layer_file(layer, rank)) for rank in missing)
            raise CheckpointError(
                f"{paths} missing: layer {layer} was saved in {size} part{'s' * (size > 1)}"
            )

    def weights(self, layer: int, tensor_rank: int) -> tuple[Path, dict[str, torch.Tensor]]:
        """Return the file with ``tensor_rank``'s part of a layer, and its tensors by NeoX's names.

        Raises:
            CheckpointError: the file is missing or damaged, or ZeRO 3 scattered the weights.
        """
        if self.has_layer_files:
            self.require_layer(layer)
            name = layer_file(layer, tensor_rank)
            return self.directory / name, _current_names(self._open(name))
        if self.is_scattered:
            raise CheckpointError(
                f"{self.directory} was written by ZeRO stage 3, which scatters the weights; it can "
                "be resumed at its own topology, weights alone cannot be read from it yet"
            )
        return (
            self.directory / model_states_file(tensor_rank),
            _current_names(self._sequential_layers(tensor_rank).get(layer, {})),
        )

    def gradient_accumulation_steps(self, ds_config: Mapping[str, Any] | None) -> int:
        """Return the micro steps per step the writer took.

        Args:
            ds_config: DeepSpeed's configuration as stored in one of the files.

        Raises:
            CheckpointError: neither the files nor ``configs/`` tell.
        """
        stored = (ds_config or {}).get("gradient_accumulation_steps")
        if isinstance(stored, int):
            return stored
        for path in sorted((self.directory / "configs").glob("*")):
            content = _read_yaml(path)
            for key in ("gradient_accumulation_steps", "gradient-accumulation-steps", "gas"):
                if isinstance(content.get(key), int):
                    return int(content[key])
        raise CheckpointError(
            f"{self.directory}: neither its files nor configs/ say gradient_accumulation_steps, "
            "which the optimizer's moments of a NeoX pipeline run are scaled by; load the weights "
            "alone with no_load_optim: true"
        )

    def _sequential_layers(self, tensor_rank: int) -> dict[int, dict[str, torch.Tensor]]:
        layers: dict[int, dict[str, torch.Tensor]] = {}
        module = self.model_states(tensor_rank).get("module")
        if not isinstance(module, Mapping):
            raise CheckpointError(
                f"{self.directory} holds no layer files, and no weights in "
                f"{model_states_file(tensor_rank)} either"
            )
        for name, tensor in module.items():
            match = _SEQUENTIAL_NAME.fullmatch(name)
            if match is None:
                raise CheckpointError(
                    f"{self.directory / model_states_file(tensor_rank)}: tensor {name!r} is not "
                    "called sequential.<layer>.<name>"
                )
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        return layers

    def _configured_size(self) -> int:
        if self.is_ours:
            return _read_ledger(self.directory).tensor_parallel_size
        size = self.model_arguments.get("model_parallel_size", 1)
        return size if isinstance(size, int) else 1

    def _open(self, name: str) -> dict[str, Any]:
        if name not in self._opened:
            content = read_torch_file(self.directory / name, is_verified=self._is_verified)
            if not isinstance(content, Mapping):
                raise CheckpointError(
                    f"{self.directory / name} holds a {type(content).__name__}, not a dictionary"
                )
            self._opened[name] = dict(content)
        return self._opened[name]


def read_model_facts(
    directory: Path, *, gpt_j_residual: bool, is_verified: bool = False
) -> StoredFacts:
    """Return the facts that every run loading ``directory`` takes over (design §5).

    Ours are in ``ledger.json``. NeoX's follow from the arguments it stores, and for layer files
    alone from the embedding's shape and the number of its parts.

    Args:
        directory: a ``global_stepN``.
        gpt_j_residual: whether the model adds replicated biases once per tensor rank in NeoX.
        is_verified: its files' digests or checksums were just checked.

    Raises:
        CheckpointError: the directory does not tell.
    """
    stored = StoredCheckpoint(directory, is_verified=is_verified)
    if stored.is_ours:
        return _read_ledger(directory)
    size = stored.tensor_parallel_size
    multiplicity = size if gpt_j_residual else 1
    vocabulary = stored.model_arguments.get("padded_vocab_size")
    if not isinstance(vocabulary, int):
        path, tensors = stored.weights(0, 0)
        embedding = tensors.get("word_embeddings.weight")
        if embedding is None:
            raise CheckpointError(f"{path} holds no word_embeddings.weight")
        vocabulary = embedding.shape[0] * size
    return StoredFacts(ModelFacts(vocabulary, multiplicity), size)


def _read_ledger(directory: Path) -> StoredFacts:
    path = directory / LEDGER_FILE
    try:
        model = json.loads(read_small_text(path, limit_bytes=_TEXT_LIMIT))["model"]
        return StoredFacts(
            ModelFacts(int(model["padded_vocab_size"]), int(model["tp_bias_multiplicity"])),
            int(model["tensor_parallel_size"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say the model's facts ({type(error).__name__}: {error}); it was "
            "damaged or edited, and a wrong guess would train another model"
        ) from error


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(read_small_text(path, limit_bytes=_TEXT_LIMIT))
    except (CheckpointError, yaml.YAMLError):
        return {}
    return content if isinstance(content, Mapping) else {}


def _current_names(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    named = {}
    for name, tensor in tensors.items():
        if is_parameter(name):
            named[current_name(name)] = tensor
    return named
