"""Where each parameter lies in the optimizer state of a stored checkpoint.

DeepSpeed's optimizers know parameters by number or by their place in a flat vector. Names come
from what is stored beside them:

    param_shapes            in mp_rank files, with ZeRO 1 and 2: names and shapes in flat order
    param_slice_mappings    in ZeRO's files: names in this data-parallel rank's part. The bf16
                            optimizer at stage 0 stores nothing else
    neither                 the plain and the fp16 optimizers: parameters stand in the order of the
                            layer files' tensors, those that decay before those that don't

The numbers of layers on each stage are not stored either; they follow from how many parameters
each stage's optimizer has.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.base.errors import CheckpointError
from megatron.checkpoint.stored import StoredCheckpoint, current_name, model_states_file
from megatron.model.settings import ModelSettings
from megatron.optim.param_groups import decays_by_name

__all__ = [
    "ParameterKey",
    "StageLayout",
    "StageSize",
    "StoredParameter",
    "derived_layouts",
    "named_layout",
    "parameter_key",
    "sliced_names",
]

ParameterKey = tuple[int, str]
"""NeoX's layer number and the name within the layer."""

_NUMBERED = re.compile(r"(?:sequential\.)?(\d+)\.(.+)")
_TIED = re.compile(r"tied_modules\.[^.]+\.(.+)")
_TIED_LAYER = 0  # the embedding is the only layer that stands in two places


@dataclass(frozen=True)
class StoredParameter:
    """One parameter's place in the optimizer state of a pipeline stage."""

    shape: tuple[int, ...]  # of every tensor rank's part
    stage: int
    group: int  # number of its parameter group
    offset: int  # of its first element in the group's flat vector
    index: int  # its number among all of the stage's parameters

    @property
    def num_elements(self) -> int:
        """Elements of one tensor rank's part."""
        return math.prod(self.shape)


_Layer = tuple[int, Mapping[str, tuple[int, ...]]]

StageLayout = dict[ParameterKey, StoredParameter]
"""The parameters of one stage, in the optimizer's order."""


@dataclass(frozen=True)
class StageSize:
    """How much one stage's optimizer holds, where it doesn't say of what."""

    num_groups: int
    total: int
    is_in_elements: bool  # False: in parameters

    def of(self, layers: Iterable[_Layer]) -> int:
        """Return the size of ``layers`` in the same unit."""
        shapes = [shape for _, tensors in layers for shape in tensors.values()]
        return sum(map(math.prod, shapes)) if self.is_in_elements else len(shapes)

    def __str__(self) -> str:
        return f"{self.total} {'elements' if self.is_in_elements else 'parameters'}"


def named_layout(
    groups: Sequence[Mapping[str, Sequence[int]]],
    *,
    stage: int,
    paddings: Sequence[Sequence[int]] | None = None,
) -> StageLayout:
    """Return the layout of a stage whose parameters are stored by name.

    Args:
        groups: for each parameter group, DeepSpeed's names and the shapes, in flat order.
        stage: of the pipeline.
        paddings: unused elements that follow each parameter in the flat vector; None: none do.

    Raises:
        CheckpointError: a name is not one of NeoX's.
    """
    layout: StageLayout = {}
    for number, shapes in enumerate(groups):
        offset = 0
        gaps = paddings[number] if paddings is not None else ()
        for (name, shape), gap in itertools.zip_longest(shapes.items(), gaps, fillvalue=0):
            place = StoredParameter(tuple(shape), stage, number, offset, len(layout))
            layout[parameter_key(name)] = place
            offset += place.num_elements + gap
    return layout


def derived_layouts(
    stored: StoredCheckpoint, settings: ModelSettings, sizes: Sequence[StageSize]
) -> list[StageLayout]:
    """Return the layout of every stage from the weights and the size of each stage's optimizer.

    Args:
        stored: the checkpoint, written without names in its optimizer state.
        settings: the model.
        sizes: of each stage's optimizer.

    Raises:
        CheckpointError: no division of the layers over the stages gives these sizes.
    """
    remaining = [(layer, _shapes(stored, layer)) for layer in stored.layer_numbers]
    embedding = remaining[:1]
    last = len(sizes) - 1
    layouts = []
    for stage, size in enumerate(sizes):
        # DeepSpeed lists tied layers first; the last stage has a copy of the embedding.
        taken = list(embedding) if settings.tied_embedding and stage == last > 0 else []
        while remaining and size.of([*taken, remaining[0]]) <= size.total:
            taken.append(remaining.pop(0))
        if size.of(taken) != size.total or (stage == last and remaining):
            source = stored.directory / model_states_file(stage * stored.tensor_parallel_size)
            raise CheckpointError(
                f"{source} holds optimizer state of {size}, which are not those of any number of "
                "consecutive layers: it belongs to another model or another save"
            )
        layouts.append(_derived_layout(taken, size.num_groups, stage))
    return layouts


def _derived_layout(layers: Iterable[_Layer], num_groups: int, stage: int) -> StageLayout:
    shapes = {
        f"{layer}.{name}": shape for layer, tensors in layers for name, shape in tensors.items()
    }
    if num_groups == 1:  # weight_decay 0: nothing is set apart
        return named_layout([shapes], stage=stage)
    groups: list[dict[str, tuple[int, ...]]] = [{}, {}]
    for name, shape in shapes.items():
        groups[0 if decays_by_name(name) else 1][name] = shape
    return named_layout(groups, stage=stage)


def sliced_names(mappings: Iterable[Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """Return the names of each group in flat order, from ZeRO's slice mappings of all ranks.

    Args:
        mappings: ``param_slice_mappings`` of each data-parallel rank, in order.
    """
    groups: list[dict[str, None]] = []
    for mapping in mappings:
        for number, slices in enumerate(mapping):
            if number == len(groups):
                groups.append({})
            in_order = sorted(slices, key=lambda name: slices[name].start)
            # A parameter divided between two ranks comes a second time.
            groups[number].update(dict.fromkeys(in_order))
    return [list(group) for group in groups]


def parameter_key(name: str) -> ParameterKey:
    """Return layer and name of what DeepSpeed calls ``name``.

    Raises:
        CheckpointError: it is not one of NeoX's names.
    """
    if match := _NUMBERED.fullmatch(name):
        return int(match[1]), current_name(match[2])
    if match := _TIED.fullmatch(name):
        return _TIED_LAYER, current_name(match[1])
    raise CheckpointError(
        f"the optimizer state names a parameter {name!r}, which is not called <layer>.<name>, "
        "sequential.<layer>.<name> or tied_modules.<key>.<name>"
    )


def _shapes(stored: StoredCheckpoint, layer: int) -> dict[str, tuple[int, ...]]:
    _, tensors = stored.weights(layer, 0)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
