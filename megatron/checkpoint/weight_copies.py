"""Are the weights the optimizer's fp32 copies of them, rounded? No torch.

If not, layer files and optimizer files come from different saves, or a rank's file stands under
another's name: nothing else tells of that in a checkpoint without a manifest.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import CheckpointError
from megatron.base.torch_metadata import StoredTensor
from megatron.checkpoint.mapped_tensors import MappedFile, are_equal_rounded
from megatron.checkpoint.stored_headers import ELASTIC, OptimizerPart, Place, parameter_place
from megatron.checkpoint.structure import Structure

__all__ = ["differing_weights"]

_LISTED = 3  # of the tensors of one file
_KINDS = ("ZeRO 1", "ZeRO 2", "bf16", ELASTIC)


def differing_weights(structure: Structure) -> list[str]:
    """Return the files whose weights differ from the optimizer's copies, with their tensors.

    Only ZeRO 1 and 2 (NeoX v1.0's too) and the bf16 optimizer say where their copies lie; of other
    checkpoints nothing is returned. One parameter is in memory at a time.

    Args:
        structure: of a checkpoint without structural problems.

    Raises:
        CheckpointError: a file cannot be read.
    """
    problems = []
    for rank, metadata in structure.metadata.items():
        copies = _copies(structure, rank)
        groups = metadata.shapes or _v1_groups(structure.optimizer.get((0, rank)))
        if groups is None or copies is None:
            continue
        different: dict[int, list[str]] = {}
        for (layer, name), (weight, dtype), copy in _pairs(structure, rank, groups, copies):
            if not are_equal_rounded(weight, dtype, copy):
                different.setdefault(layer, []).append(name)
        for layer, names in different.items():
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            problems.append(
                f"{_weights_file(structure, layer, rank)}: {', '.join(names[:_LISTED])}{more} of "
                f"layer {layer} differ from the optimizer's copies in "
                f"{structure.files.optimizer[0, rank]}: they come from different saves or ranks"
            )
    return problems


def _copies(structure: Structure, rank: int) -> list[list[NDArray[Any]]] | None:
    """Return the flat copies of every parameter group, in pieces; None if they can't be placed."""
    ranks = [(data_rank, rank) for data_rank in range(structure.data_parallel_size)]
    if any(structure.optimizer.get(place) is None for place in ranks):
        return None
    if any(structure.optimizer[place].kind not in _KINDS for place in ranks):
        return None
    pieces = []
    for place in ranks:
        file = MappedFile(structure.checkpoint / structure.files.optimizer[place])
        state = file.content["optimizer_state_dict"]
        if structure.optimizer[place].kind == ELASTIC:
            dealt = state["local_sub_partitions_of_fp32_groups"]
            pieces.append([[file.array(one) for one in group] for group in dealt])
            continue
        if any(any(group) for group in state.get("param_alignment_paddings") or ()):
            return None
        pieces.append([[file.array(one)] for one in state["single_partition_of_fp32_groups"]])
    # of each group the first piece of every rank, then the second of every rank
    return [
        [piece for interval in zip(*group, strict=True) for piece in interval]
        for group in zip(*pieces, strict=True)
    ]


def _v1_groups(part: OptimizerPart | None) -> list[Mapping[Place, tuple[int, ...]]] | None:
    """Return the shapes of each group where NeoX v1.0 lists those of all together."""
    if part is None or part.kind != ELASTIC or not part.shapes:
        return None
    shapes = part.shapes[0]
    if len(part.masters) == 1:
        return [shapes]
    return [  # matrices, and the norms and biases, which don't decay
        {place: shape for place, shape in shapes.items() if (len(shape) == 1) is are_vectors}
        for are_vectors in (False, True)
    ]


def _pairs(
    structure: Structure,
    rank: int,
    groups: Sequence[Mapping[Place, tuple[int, ...]]],
    copies: Sequence[Sequence[NDArray[Any]]],
) -> Iterator[tuple[Place, tuple[NDArray[Any], str], NDArray[np.float32]]]:
    opened: dict[str, tuple[MappedFile, dict[Place, StoredTensor]]] = {}
    for shapes, pieces in zip(groups, copies, strict=True):
        start = 0
        for place, shape in shapes.items():
            name = _weights_file(structure, place[0], rank)
            if name not in opened:
                file = MappedFile(structure.checkpoint / name)
                opened[name] = file, _placed(file.content, place[0])
            file, weights = opened[name]
            if place not in weights:
                raise CheckpointError(f"{file.path} lacks {place[1]}")
            stop = start + math.prod(shape)
            weight = weights[place]
            yield place, (file.array(weight), weight.dtype), _slice(pieces, start, stop)
            start = stop


def _weights_file(structure: Structure, layer: int, rank: int) -> str:
    tensor_rank = rank % structure.tensor_parallel_size
    return structure.files.layers.get((layer, tensor_rank)) or structure.files.model_states[rank]


def _placed(content: Mapping[str, Any], layer: int) -> dict[Place, StoredTensor]:
    tensors = content.get("module", content)
    return {
        parameter_place(name) or (layer, name): tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, StoredTensor)
    }


def _slice(pieces: Sequence[NDArray[Any]], start: int, stop: int) -> NDArray[np.float32]:
    found, first = [], 0
    for piece in pieces:
        low, high = max(start - first, 0), min(stop - first, piece.size)
        if low < high:
            found.append(piece[low:high])
        first += piece.size
    return found[0] if len(found) == 1 else np.concatenate(found)
