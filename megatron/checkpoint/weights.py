"""Weights from layer files, or from a sequential module's file, into a live module.

The writer's tensor- and pipeline-parallel sizes don't matter: layers are found by their number,
and of every tensor only the slices that this rank holds are read.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.zero import GatheredParameters
from torch import nn

from megatron.base.errors import CheckpointError
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.checkpoint.stored_headers import is_parameter
from megatron.model.layer_plan import TIED_WEIGHT
from megatron.model.settings import ModelSettings
from megatron.model.tp_layout import tensor_split

__all__ = [
    "copy_weights",
    "numbered_layers",
    "rank_part",
    "read_weights",
    "stored_shape",
    "unused_copies",
]

LayerWeights = dict[int, dict[str, torch.Tensor]]
"""Layer number -> tensor name -> this rank's part."""


def numbered_layers(module: nn.Module) -> dict[int, nn.Module]:
    """Return the layers with parameters that this rank holds, by NeoX's number.

    A tied layer is listed under the number where it comes first, even on the stage that holds
    only its copy.
    """
    if not isinstance(module, PipelineModule):
        return {int(index): layer for index, layer in module.sequential.named_children()}
    layers = {
        module._local_start + offset: layer
        for offset, layer in enumerate(module.forward_funcs)
        if isinstance(layer, nn.Module)
    }
    for key, tied in module.tied_modules.items():
        places = [
            index
            for index, spec in enumerate(module._layer_specs)
            if isinstance(spec, TiedLayerSpec) and spec.key == key
        ]
        for index in places:
            layers.pop(index, None)
        layers[places[0]] = tied
    return layers


def unused_copies(module: nn.Module) -> set[int]:
    """Return the ids of parameters that stand in a tied layer's copy and take no part there.

    The last stage has the whole embedding layer to share its matrix; learned positions come along
    and are decayed, but nothing uses them and no file holds them.
    """
    if not isinstance(module, PipelineModule):
        return set()
    return {
        id(parameter)
        for tied in module.tied_modules.values()
        for name, parameter in tied.named_parameters()
        if getattr(parameter, "ds_pipe_replicated", False) and name != TIED_WEIGHT
    }


def read_weights(
    stored: StoredCheckpoint,
    module: nn.Module,
    *,
    settings: ModelSettings,
    tensor_parallel_size: int,
    tensor_rank: int,
) -> LayerWeights:
    """Return this rank's part of every tensor of ``module``; nothing is changed.

    Parts may be mappings of the files: copy them before the checkpoint is deleted.

    Args:
        stored: the checkpoint.
        module: this rank's pipeline stage, or the sequential model.
        settings: the model, with the checkpoint's pinned facts.
        tensor_parallel_size: of this run.
        tensor_rank: of this rank.

    Raises:
        CheckpointError: a file or tensor is missing, or doesn't fit; names file, tensor, shapes.
    """
    return {
        index: _read_layer(stored, index, layer, settings, tensor_parallel_size, tensor_rank)
        for index, layer in sorted(numbered_layers(module).items())
    }


def copy_weights(module: nn.Module, weights: LayerWeights) -> None:
    """Copy what :func:`read_weights` returned into the module's parameters and buffers."""
    for index, layer in numbered_layers(module).items():
        parameters = list(layer.parameters())
        # ZeRO 3 keeps a part of every parameter on each rank.
        scattered = any(hasattr(parameter, "ds_id") for parameter in parameters)
        whole = GatheredParameters(parameters, modifier_rank=0) if scattered else nullcontext()
        with whole, torch.no_grad():
            for name, tensor in _tensors(layer).items():
                tensor.copy_(weights[index][name])


def rank_part(
    name: str,
    parts: Sequence[torch.Tensor],
    *,
    size: int,
    rank: int,
    settings: ModelSettings,
) -> torch.Tensor:
    """Return what tensor rank ``rank`` of ``size`` holds of a tensor stored in ``parts``.

    Reads only the slices it needs. Equal to splitting the merged tensor, except that at an
    unchanged size a rank gets its own copy of a replicated tensor back.

    Args:
        name: the tensor's name.
        parts: those of all the writer's tensor ranks.
        size: tensor-parallel size of the reader.
        rank: the reader.
        settings: the model.
    """
    if len(parts) == size:
        return parts[rank]
    division = tensor_split(name, settings)
    if division.dim is None:
        return parts[0]
    dim = division.dim
    pieces: list[torch.Tensor] = []
    stored_start = 0  # of this block, in every stored part
    for block in division.blocks:
        stored_length, length = -(-block // len(parts)), -(-block // size)
        start, stop = rank * length, (rank + 1) * length
        for index, part in enumerate(parts):
            first = index * stored_length
            low, high = max(start, first), min(stop, first + stored_length, block)
            if low < high:
                pieces.append(part.narrow(dim, stored_start + low - first, high - low))
        padding = stop - max(start, min(stop, block))
        if padding:
            shape = list(parts[0].shape)
            shape[dim] = padding
            pieces.append(parts[0].new_zeros(shape))
        stored_start += stored_length
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def _read_layer(
    stored: StoredCheckpoint,
    index: int,
    layer: nn.Module,
    settings: ModelSettings,
    size: int,
    rank: int,
) -> dict[str, torch.Tensor]:
    ranks = range(stored.tensor_parallel_size)
    needed = [rank] if len(ranks) == size else ranks
    files = {source: stored.weights(index, source) for source in needed}
    wanted = _tensors(layer)
    for path, tensors in files.values():
        _require_same_names(path, index, tensors, wanted)
    result = {}
    for name, tensor in wanted.items():
        parts = []
        for source, (path, tensors) in files.items():
            expected = stored_shape(name, _whole_shape(tensor), settings, len(ranks))
            if tuple(tensors[name].shape) != expected:
                raise CheckpointError(
                    f"{path}: {name} of layer {index} has shape {tuple(tensors[name].shape)}, but "
                    f"this model needs {expected} on tensor rank {source} of {len(ranks)}: the "
                    "file is stale or belongs to another model"
                )
            parts.append(tensors[name])
        result[name] = (
            parts[0]
            if len(ranks) == size
            else rank_part(name, parts, size=size, rank=rank, settings=settings)
        )
    return result


def stored_shape(
    name: str, local_shape: tuple[int, ...], settings: ModelSettings, parts: int
) -> tuple[int, ...]:
    division = tensor_split(name, settings)
    if division.dim is None:
        return local_shape
    shape = list(local_shape)
    shape[division.dim] = sum(-(-block // parts) for block in division.blocks)
    return tuple(shape)


def _require_same_names(
    path: Any, index: int, tensors: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    missing = sorted(set(wanted) - set(tensors))
    unexpected = sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        problems = [f"it lacks {', '.join(missing)}"] * bool(missing)
        problems += [f"it also holds {', '.join(unexpected)}"] * bool(unexpected)
        raise CheckpointError(
            f"{path}: layer {index} is not the one this configuration describes: "
            f"{'; '.join(problems)}"
        )


def _tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    # The live tensors themselves; megatron-core's layers add entries that are none. What is
    # computed rather than trained (ALiBi's slopes, frequencies) stays as it was built.
    state = layer.state_dict(keep_vars=True)
    return {
        name: value
        for name, value in state.items()
        if torch.is_tensor(value) and is_parameter(name)
    }


def _whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))  # ds_shape: scattered by ZeRO 3
