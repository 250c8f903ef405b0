"""Do neighbouring checkpoints hold different weights, as training leaves them?

Released checkpoints have been found to hold the weights of another step under many names. Every
file of such a checkpoint is whole; only beside its neighbour can it be seen.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.base.file_digests import FileDigest
from megatron.base.torch_metadata import StoredTensor
from megatron.checkpoint.mapped_tensors import MappedFile, tensors_in
from megatron.checkpoint.stored_headers import is_parameter, parameter_place
from megatron.checkpoint.structure import Structure

__all__ = ["Fingerprint", "fingerprint", "likenesses"]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_CHUNK = 1 << 24  # bytes


@dataclass(frozen=True)
class Fingerprint:
    """Digests of a checkpoint's tensors."""

    name: str  # of the directory
    weights: Mapping[tuple[int, int, str], str]  # by layer, tensor rank and tensor
    matrices: frozenset[tuple[int, int, str]]  # those of the weights that every step changes
    moments: Mapping[tuple[str, str], str]  # by file and path within
    shape: tuple[int, ...]  # tensor-parallel size, model ranks, data-parallel ranks


def fingerprint(structure: Structure) -> Fingerprint:
    """Return the digests of all weights and moments; one file is open at a time, mapped. No torch.

    Raises:
        CheckpointError: a file cannot be read.
    """
    weights: dict[tuple[int, int, str], str] = {}
    matrices: set[tuple[int, int, str]] = set()
    moments: dict[tuple[str, str], str] = {}
    files = structure.files
    for (layer, rank), name in files.layers.items():
        file = MappedFile(structure.checkpoint / name)
        for path, tensor in tensors_in(file.content):
            _add(weights, matrices, (layer, rank, path), file.array(tensor))
    for rank, name in files.model_states.items():
        file = MappedFile(structure.checkpoint / name)
        for path, tensor in (file.content.get("module") or {}).items():
            place = parameter_place(path)
            if place is not None and isinstance(tensor, StoredTensor):
                _add(weights, matrices, (place[0], rank, place[1]), file.array(tensor))
        moments.update(_moments(name, file, file.content.get("optimizer")))
    for name in files.optimizer.values():
        file = MappedFile(structure.checkpoint / name)
        moments.update(_moments(name, file, file.content))
    sizes = (structure.tensor_parallel_size, structure.model_ranks, structure.data_parallel_size)
    return Fingerprint(structure.checkpoint.name, weights, frozenset(matrices), moments, sizes)


def likenesses(one: Fingerprint, other: Fingerprint) -> tuple[list[str], list[str]]:
    """Compare two checkpoints of different steps.

    Returns:
        What is equal though it shouldn't be, and what could not be compared.
    """
    both = f"{one.name} and {other.name}"
    if one.shape[0] != other.shape[0] or not set(one.weights) & set(other.weights):
        return [], [
            f"{both}: not compared, their files are divided in other ways "
            f"(tensor-parallel sizes {one.shape[0]} and {other.shape[0]})"
        ]
    problems = []
    common = set(one.weights) & set(other.weights)
    equal = {place for place in common if one.weights[place] == other.weights[place]}
    if equal == common:
        problems.append(
            f"{both}: all {len(common)} weight tensors are identical: one of them holds the other "
            "step's weights, unless nothing was learnt in between (a learning rate of 0)"
        )
    else:
        for layer in _layers(one.matrices & common):
            mine = {place for place in common if place[:2] == layer}
            if mine <= equal:
                problems.append(
                    f"{both}: all {len(mine)} tensors of layer {layer[0]}, tensor rank {layer[1]}, "
                    "are identical, those of other layers are not: the file is another step's"
                )
    if one.shape == other.shape:
        shared = set(one.moments) & set(other.moments)
        same = {key for key in shared if one.moments[key] == other.moments[key]}
        if same and same == shared:
            problems.append(f"{both}: all {len(same)} optimizer moments are identical")
        elif same:
            names = sorted({file for file, _ in same})
            problems.append(f"{both}: optimizer moments are identical in {', '.join(names[:4])}")
    return problems, []


def _layers(places: Iterable[tuple[int, int, str]]) -> list[tuple[int, int]]:
    return sorted({(layer, rank) for layer, rank, _ in places})


def _add(
    weights: dict[tuple[int, int, str], str],
    matrices: set[tuple[int, int, str]],
    place: tuple[int, int, str],
    array: NDArray[Any],
) -> None:
    if is_parameter(place[2]):
        weights[place] = _digest(array)
        if array.ndim > 1:
            matrices.add(place)


def _moments(name: str, file: MappedFile, content: Any) -> dict[tuple[str, str], str]:
    found = {}
    for path, tensor in tensors_in(content):
        if path.rpartition(".")[2] in _MOMENTS and tensor.numel:
            array = file.array(tensor)
            if array.any():  # all zero: nothing was learnt yet
                found[name, path] = _digest(array)
    return found


def _digest(array: NDArray[Any]) -> str:
    digest = FileDigest()
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, len(data), _CHUNK):
        digest.update(data[start : start + _CHUNK])
    return digest.hexdigest()
