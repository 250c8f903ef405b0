"""A Hugging Face model by our names, checked as a whole before a value of it is used."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megatron.base.errors import CheckpointError
from megatron.checkpoint.hugging_face.architecture import Architecture, read_architecture
from megatron.checkpoint.hugging_face.hub_directory import read_json
from megatron.checkpoint.hugging_face.names import (
    OLD_HEAD,
    TensorKey,
    hub_names,
    is_computed,
    is_counted_often,
    whole_shapes,
)
from megatron.checkpoint.hugging_face.values import ValueWatch, row_pieces
from megatron.checkpoint.hugging_face.weight_files import WeightFiles, listed
from megatron.checkpoint.reshape.streamed_file import StreamedTensor
from megatron.model.settings import ModelSettings
from megatron.model.tp_layout import tensor_split

__all__ = ["HubModel", "open_hub_model"]

_RELEASE_BYTES = 32 << 20


class HubModel:
    """A Hugging Face model by our names: every tensor there, of the right shape, none too many."""

    def __init__(self, architecture: Architecture, weights: WeightFiles) -> None:
        self.architecture = architecture
        self.weights = weights
        self._names = hub_names(architecture.settings)
        self.shapes: Mapping[TensorKey, tuple[int, ...]] = whole_shapes(architecture.settings)
        self._read_bytes = 0
        _check_tensors(architecture.settings, weights, self._names, self.shapes)
        if architecture.settings.tied_embedding:
            _require_tied(weights, self._names[0, "word_embeddings.weight"])

    @property
    def settings(self) -> ModelSettings:
        """The model."""
        return self.architecture.settings

    def tensor(self, layer: int, name: str) -> torch.Tensor:
        """Return a whole tensor as it is stored; biases are those of a multiplicity of 1."""
        return self.weights.tensor(_stored_name(self.weights, self._names[layer, name]))

    def part(
        self, layer: int, name: str, *, size: int, rank: int, watch: ValueWatch
    ) -> StreamedTensor:
        """Return tensor rank ``rank``'s part as our files hold it, read while it is written.

        Writing it raises CheckpointError if a value isn't finite.
        """
        whole = self.tensor(layer, name)
        part, padding = _rank_view(name, whole, self.settings, size, rank)
        return StreamedTensor(
            (part.shape[0] + padding, *part.shape[1:]),
            watch.dtype_of(whole),
            lambda: self._pieces(layer, name, size, rank, watch),
        )

    def _pieces(
        self, layer: int, name: str, size: int, rank: int, watch: ValueWatch
    ) -> Iterator[torch.Tensor]:
        theirs = _stored_name(self.weights, self._names[layer, name])
        where = f"{self.weights.directory / self.weights.files[theirs]}: {theirs}"
        often = is_counted_often(name, self.settings)
        divided_by = self.settings.tp_bias_multiplicity if often else 1
        whole = self.weights.tensor(theirs)
        part, padding = _rank_view(name, whole, self.settings, size, rank)
        for piece in row_pieces(part):
            yield watch.pass_on(piece, where=where, divided_by=divided_by)
            self._count(piece)
        if padding:
            rows = part.new_zeros((padding, *whole.shape[1:]))
            yield watch.pass_on(rows, where=where)

    def _count(self, piece: torch.Tensor) -> None:
        self._read_bytes += piece.numel() * piece.element_size()
        if self._read_bytes >= _RELEASE_BYTES:
            self._read_bytes = 0
            self.weights.release()


def open_hub_model(source: Path, *, bias_multiplicity: int = 1) -> HubModel:
    """Open a directory laid out as on the hub; no values are read but those of a tied matrix.

    Args:
        source: with ``config.json`` and weights.
        bias_multiplicity: m, how often a run from it will count the biases of attention and MLP;
            our files then hold theirs divided by m (design §5).

    Raises:
        CheckpointError: a file or tensor is missing, damaged, unexpected or of another shape, or
            the architecture has something we can't express.
        ConfigError: a size or the multiplicity doesn't fit the model.
    """
    config = read_json(source, "config.json")
    architecture = read_architecture(
        config, source=str(source / "config.json"), bias_multiplicity=bias_multiplicity
    )
    return HubModel(architecture, WeightFiles(source))


def _check_tensors(
    settings: ModelSettings,
    weights: WeightFiles,
    names: Mapping[TensorKey, str],
    shapes: Mapping[TensorKey, tuple[int, ...]],
) -> None:
    wanted = {_stored_name(weights, name): shapes[key] for key, name in names.items()}
    head = (*OLD_HEAD, "embed_out.weight")
    missing = [name for name in wanted if name not in weights]
    unexpected = [
        name
        for name in weights.files
        if name not in wanted
        and not is_computed(name)
        and not (settings.tied_embedding and name in head)
    ]
    directory = weights.directory
    if missing or unexpected:
        problems = [f"missing {listed(missing)}"] * bool(missing)
        problems += [f"unexpected {listed(unexpected)}"] * bool(unexpected)
        raise CheckpointError(
            f"{directory}: the weights are not those of its config.json "
            f"({settings.num_layers} layers, tie_word_embeddings "
            f"{str(settings.tied_embedding).lower()}): {'; '.join(problems)}"
        )
    for name, shape in wanted.items():
        found = tuple(weights.tensor(name).shape)
        if found != shape:
            raise CheckpointError(
                f"{directory / weights.files[name]}: {name} has shape {list(found)}, but "
                f"config.json makes it {list(shape)}: weights and config.json are of different "
                "models"
            )


def _require_tied(weights: WeightFiles, embedding: str) -> None:
    for name in (*OLD_HEAD, "embed_out.weight"):
        if name not in weights:
            continue
        first, second = weights.tensor(embedding), weights.tensor(name)
        if first.shape != second.shape or not all(
            map(torch.equal, row_pieces(first), row_pieces(second))
        ):
            raise CheckpointError(
                f"{weights.directory}: config.json says tie_word_embeddings: true, but {name} "
                f"is not {embedding}"
            )


def _stored_name(weights: WeightFiles, name: str) -> str:
    """Return what the files call a tensor."""
    if name == "embed_out.weight" and name not in weights:
        return next((other for other in OLD_HEAD if other in weights), name)
    return name


def _rank_view(
    name: str, whole: torch.Tensor, settings: ModelSettings, size: int, rank: int
) -> tuple[torch.Tensor, int]:
    """Return a tensor rank's part without copying it, and how many rows of zeros follow."""
    division = tensor_split(name, settings)
    if division.dim is None:
        return whole, 0
    (block,) = division.blocks
    length = -(-block // size)
    start, stop = (min(edge * length, block) for edge in (rank, rank + 1))
    return whole.narrow(division.dim, start, stop - start), length - (stop - start)
