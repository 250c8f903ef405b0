"""What each rank of a topology holds, worked out without starting one.

layers -> stages        as DeepSpeed divides them (pipe_partition_method)
stage  -> groups        parameters in the order of the optimizer's groups: tied ones first, then
                        layer by layer, in a layer in the order of its file
group  -> flat vector   one parameter behind the other, padded so that data-parallel ranks get
                        equal parts; a part begins and ends anywhere inside a parameter
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from deepspeed.runtime import utils as deepspeed_utils

from megatron.base.errors import ConfigError
from megatron.config.topology import Topology
from megatron.model.layer_plan import PlannedLayer

__all__ = [
    "FlatGroup",
    "Fragment",
    "Stage",
    "StageParameter",
    "plan_stages",
    "stage_bounds",
]

LayerShapes = Mapping[int, Mapping[str, tuple[int, ...]]]
"""Layer number -> name -> shape of a tensor rank's part; layers with parameters, in file order."""

_ALIGNMENT = 2  # elements; DeepSpeed's nccl_start_alignment_factor


@dataclass(frozen=True)
class StageParameter:
    """One parameter of a stage."""

    layer: int
    name: str  # in the layer's file
    engine_name: str  # what DeepSpeed calls it
    shape: tuple[int, ...]  # of a tensor rank's part

    @property
    def num_elements(self) -> int:
        """Elements of a tensor rank's part."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, the same for all its tensor-parallel ranks."""

    layers: tuple[int, ...]  # whose files it writes
    parameters: tuple[StageParameter, ...]  # in the order of its modules


@dataclass(frozen=True)
class Fragment:
    """What a data-parallel rank has of one parameter."""

    parameter: StageParameter
    start: int  # first element within the parameter
    stop: int
    offset: int  # of that element within the rank's part of the flat vector

    @property
    def num_elements(self) -> int:
        """Elements the rank has."""
        return self.stop - self.start


@dataclass(frozen=True)
class FlatGroup:
    """A parameter group as one vector, divided evenly over the data-parallel ranks."""

    parameters: tuple[StageParameter, ...]
    num_partitions: int  # data-parallel ranks

    @cached_property
    def num_elements(self) -> int:
        """Elements of all parameters."""
        return sum(parameter.num_elements for parameter in self.parameters)

    @property
    def partition_size(self) -> int:
        """Elements of every rank's part, padding included."""
        unit = _ALIGNMENT * self.num_partitions
        return -(-self.num_elements // unit) * unit // self.num_partitions

    def padding(self, rank: int) -> int:
        """Return how many elements at the end of ``rank``'s part belong to no parameter."""
        missing = (rank + 1) * self.partition_size - self.num_elements
        return min(max(missing, 0), self.partition_size)

    def fragments(self, rank: int) -> Iterator[Fragment]:
        """Yield what ``rank`` has, in order."""
        first, last = rank * self.partition_size, (rank + 1) * self.partition_size
        begin = 0
        for parameter in self.parameters:
            end = begin + parameter.num_elements
            start, stop = max(begin, first), min(end, last)
            if start < stop:
                yield Fragment(parameter, start - begin, stop - begin, start - first)
            begin = end


def plan_stages(
    plan: Sequence[PlannedLayer],
    shapes: LayerShapes,
    topology: Topology,
    *,
    partition_method: str,
) -> list[Stage]:
    """Return the stages of ``topology``.

    Args:
        plan: the model's layers; none is built.
        shapes: of the parameters at the topology's tensor-parallel size.
        topology: the one planned for.
        partition_method: NeoX's ``pipe_partition_method``.

    Raises:
        ConfigError: the method is unknown, or a stage would have no layer with parameters.
    """
    if not topology.uses_pipeline_engine:
        parameters = tuple(
            StageParameter(layer, name, f"sequential.{layer}.{name}", shape)
            for layer, tensors in shapes.items()
            for name, shape in tensors.items()
        )
        return [Stage(tuple(shapes), parameters)]
    counts = [
        sum(math.prod(shape) for shape in shapes.get(_owner(plan, layer), {}).values())
        for layer in plan
    ]
    bounds = stage_bounds(
        [layer.kind.__name__ for layer in plan],
        counts,
        topology.pipeline_parallel_size,
        method=partition_method,
    )
    stages = []
    for stage, numbers in enumerate(bounds):
        layers = [plan[number] for number in numbers]
        tied = dict.fromkeys((layer.tied_key, _owner(plan, layer)) for layer in layers)
        parameters = [
            StageParameter(owner, name, f"tied_modules.{key}.{name}", shape)
            for key, owner in tied
            if key is not None
            for name, shape in shapes[owner].items()
        ]
        untied = [layer.index for layer in layers if layer.tied_key is None]
        parameters += [
            StageParameter(number, name, f"{number}.{name}", shape)
            for number in untied
            for name, shape in shapes.get(number, {}).items()
        ]
        if not parameters:
            raise ConfigError(
                f"pipeline stage {stage} of {len(bounds)} would hold no parameters: the model has "
                f"{len(shapes)} layers with parameters; choose fewer stages"
            )
        stages.append(Stage(tuple(n for n in numbers if n in shapes), tuple(parameters)))
    return stages


def stage_bounds(
    layer_names: Sequence[str], num_parameters: Sequence[int], num_stages: int, *, method: str
) -> list[range]:
    """Return the layer numbers of every stage, as DeepSpeed's PipelineModule divides them.

    Args:
        layer_names: class or function name of every layer.
        num_parameters: of every layer.
        num_stages: pipeline-parallel size.
        method: ``uniform``, ``parameters`` or ``type:<regular expression>``.

    Raises:
        ConfigError: another method, or a type that no layer is of.
    """
    method = method.lower()
    if method == "uniform":
        bounds = deepspeed_utils.partition_uniform(len(layer_names), num_stages)
    elif method == "parameters":
        bounds = deepspeed_utils.partition_balanced(list(num_parameters), num_stages)
    elif method.startswith("type:"):
        pattern = re.compile(method.split(":")[1], re.IGNORECASE)
        weights = [int(bool(pattern.search(name))) for name in layer_names]
        if not any(weights):
            raise ConfigError(f"pipe_partition_method {method!r}: no layer is of such a type")
        bounds = deepspeed_utils.partition_balanced(weights, num_stages)
    else:
        raise ConfigError(
            f"pipe_partition_method {method!r} is not known; uniform, parameters and type:... are"
        )
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def _owner(plan: Sequence[PlannedLayer], layer: PlannedLayer) -> int:
    """Return the number under which a layer's parameters are known: of tied layers, the first."""
    if layer.tied_key is None:
        return layer.index
    return next(other.index for other in plan if other.tied_key == layer.tied_key)
