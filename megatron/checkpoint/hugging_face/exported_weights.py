"""The weights of a checkpoint of ours or NeoX's, put together for Hugging Face while written."""

from collections.abc import Iterator, Sequence

import torch

from megatron.base.errors import CheckpointError
from megatron.checkpoint.hugging_face.names import (
    TensorKey,
    hub_names,
    is_counted_often,
    whole_shapes,
)
from megatron.checkpoint.hugging_face.values import ValueWatch, row_pieces
from megatron.checkpoint.hugging_face.weight_files import listed
from megatron.checkpoint.reshape.mapped_pages import MappedPages
from megatron.checkpoint.reshape.streamed_file import StreamedTensor
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.checkpoint.weights import stored_shape
from megatron.model.settings import ModelSettings
from megatron.model.tp_layout import tensor_split

__all__ = ["ExportedWeights"]

_VOCABULARY = ("word_embeddings.weight", "final_linear.weight")
_RELEASE_BYTES = 32 << 20


class ExportedWeights:
    """The weights of a checkpoint by Hugging Face's names.

    Args:
        stored: the checkpoint.
        settings: its model.
        rows: of the vocabulary that are kept.
        dtype: values are converted to it; None: the checkpoint's.

    Raises:
        CheckpointError: the checkpoint isn't of that model.
    """

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


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
