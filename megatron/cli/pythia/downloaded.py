"""A directory of a released step, by NeoX's layers and names, in whichever form it lies.

Hugging Face's     config.json and weights, as the branch on the hub
NeoX's             layer_*.pt and mp_rank_*.pt, at the top (as the neox-ckpt repositories have
                   them) or in global_stepN/
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron.base.errors import CheckpointError
from megatron.checkpoint.hugging_face.architecture import read_architecture
from megatron.checkpoint.hugging_face.hub_directory import has_file, read_json, without_links
from megatron.checkpoint.hugging_face.hub_model import open_hub_model
from megatron.checkpoint.hugging_face.names import OLD_HEAD, hub_names
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.checkpoint.weights import rank_part
from megatron.cli.checkpoints.found import find_checkpoints
from megatron.model.settings import ModelSettings
from megatron.model.tp_layout import tensor_split

__all__ = ["Downloaded", "Place", "declared_sizes", "open_downloaded", "step_named"]

Place = tuple[int, str]
"""Layer and name of a tensor, as NeoX has them."""

_STEP = re.compile(r"(?:global_)?step(\d+)|(.*[-_@])step(\d+)")
_CONFIG = "config.json"
_FLAT_FILES = ("model.pt", "optimizer.pt", "latest_checkpointed_iteration.txt")
_MAIN_STEP = 143000  # the hub's branch `main` (pythia.md §4)


@dataclass(frozen=True)
class Downloaded:
    """An opened directory; nothing of its tensors is read before it is asked for."""

    path: Path  # where the files are
    shapes: Mapping[Place, tuple[int, ...]]  # of whole tensors, in the order of the layers
    read: Callable[[Place], tuple[str, torch.Tensor]]
    """Gives the files that hold a tensor, and the whole of it."""
    release: Callable[[], None]
    """Lets go of the memory of what was read."""
    stored: StoredCheckpoint | None = None  # NeoX's form

    @property
    def is_neox(self) -> bool:
        """Whether it is in NeoX's form, else Hugging Face's."""
        return self.stored is not None

    @property
    def steps_inside(self) -> dict[str, int]:
        """The step that each of NeoX's metadata files says; Hugging Face's say none."""
        if self.stored is None:
            return {}
        found = {}
        for rank in self.stored.model_ranks:
            states = self.stored.model_states(rank)
            step = states.get("iteration", states.get("total_iters"))
            if isinstance(step, int):
                found[f"mp_rank_{rank:02d}_model_states.pt"] = step
        return found

    @property
    def vocabulary(self) -> int:
        """Rows of its embedding."""
        return self.shapes[0, "word_embeddings.weight"][0]


def declared_sizes(directory: Path) -> ModelSettings | None:
    """Return the model that ``config.json`` describes; None if there is no such file.

    Raises:
        CheckpointError: it describes no model we know.
    """
    if not has_file(directory, _CONFIG):
        return None
    path = directory / _CONFIG
    return read_architecture(read_json(directory, _CONFIG), source=str(path)).settings


def open_downloaded(
    directory: Path, settings: ModelSettings, *, iteration: int | None = None
) -> Downloaded:
    """Open a directory of either form.

    Args:
        directory: what was downloaded.
        settings: the model it should be, for how NeoX divides tensors.
        iteration: chooses among several ``global_stepN``.

    Raises:
        CheckpointError: it is neither, or a file is missing or damaged.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    if has_file(directory, _CONFIG):
        return _open_hub(directory)
    return _open_neox(without_links(_checkpoint(directory, iteration)), settings)


def step_named(directory: Path) -> int | None:
    """Return the step that a directory's path names: ``.../step3000``, ``pythia-70m-step3000``."""
    if directory.name == "main":
        return _MAIN_STEP
    for part in reversed(directory.absolute().parts[-3:]):
        match = _STEP.fullmatch(part)
        if match:
            return int(match[1] or match[3])
    return None


def _open_hub(directory: Path) -> Downloaded:
    model = open_hub_model(directory)
    names = hub_names(model.settings)

    def read(place: Place) -> tuple[str, torch.Tensor]:
        theirs = names[place]
        stored = next(one for one in (theirs, *OLD_HEAD) if one in model.weights)
        return model.weights.files[stored], model.tensor(*place)

    return Downloaded(directory, dict(model.shapes), read, model.weights.release)


def _checkpoint(directory: Path, iteration: int | None) -> Path:
    try:
        checkpoints = find_checkpoints(directory).checkpoints
    except CheckpointError as error:
        flat = [name for name in _FLAT_FILES if has_file(directory, name)]
        if flat:
            raise CheckpointError(
                f"{directory} holds {', '.join(flat)}: a flat checkpoint, whose tensors' names and "
                "order are on no record here. Save its weights in Hugging Face's form: "
                f"{_CONFIG} and pytorch_model.bin"
            ) from error
        raise CheckpointError(
            f"{error}, and no {_CONFIG} as a branch of the hub has beside its weights"
        ) from error
    if len(checkpoints) == 1:
        return checkpoints[0]
    named = [path for path in checkpoints if path.name == f"global_step{iteration}"]
    if not named:
        raise CheckpointError(
            f"{directory} holds {', '.join(path.name for path in checkpoints)}; name one of them"
        )
    return named[0]


def _open_neox(directory: Path, settings: ModelSettings) -> Downloaded:
    stored = StoredCheckpoint(directory)
    size = stored.tensor_parallel_size
    shapes: dict[Place, tuple[int, ...]] = {}
    for layer in stored.layer_numbers:
        for name, tensor in stored.weights(layer, 0)[1].items():
            shape = list(tensor.shape)
            dim = tensor_split(name, settings).dim
            if dim is not None:
                shape[dim] *= size
            shapes[layer, name] = tuple(shape)
    embedding = shapes.get((0, "word_embeddings.weight"))
    if embedding is None:
        raise CheckpointError(f"{directory} holds no word_embeddings.weight of layer 0")
    # parts are joined as they were divided: by the vocabulary that the files have
    actual = replace(settings, padded_vocab_size=embedding[0])

    def read(place: Place) -> tuple[str, torch.Tensor]:
        found = [stored.weights(place[0], rank) for rank in range(size)]
        lacking = [path for path, tensors in found if place[1] not in tensors]
        if lacking:
            raise CheckpointError(f"{lacking[0]} lacks {place[1]} of layer {place[0]}")
        parts = [tensors[place[1]] for _, tensors in found]
        whole = rank_part(place[1], parts, size=1, rank=0, settings=actual)
        return ", ".join(path.name for path, _ in found), whole

    return Downloaded(directory, shapes, read, lambda: None, stored)
