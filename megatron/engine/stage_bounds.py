"""Which layers a pipeline stage holds, as DeepSpeed divides them."""

import math
import re
from collections.abc import Mapping

from deepspeed.runtime.utils import partition_balanced, partition_uniform

from megatron.base.errors import ConfigError
from megatron.model.parameter_shapes import Shapes
from megatron.model.settings import FIRST_BLOCK

__all__ = ["stage_bounds"]


def stage_bounds(
    layers: Mapping[int, Shapes], num_layers: int, stages: int, method: str
) -> list[int]:
    """Return the first layer of every stage, and one past the last (spec/model.md §11).

    Args:
        layers: parameters by layer number.
        num_layers: transformer blocks.
        stages: pipeline stages.
        method: NeoX's ``pipe_partition_method``.

    Raises:
        ConfigError: the method isn't known.
    """
    count = num_layers + 5
    if method == "uniform":
        return list(partition_uniform(count, stages))
    if method == "parameters":
        weights = [
            sum(math.prod(shape) for shape in layers.get(index, {}).values())
            for index in range(count)
        ]
        return list(partition_balanced(weights, stages))
    if not method.startswith("type:"):
        raise ConfigError(f"pipe_partition_method: {method} is not known")
    is_block = bool(
        re.search(method.removeprefix("type:"), "ParallelTransformerLayerPipe", re.IGNORECASE)
    )
    after = FIRST_BLOCK + num_layers
    weights = [int(is_block and FIRST_BLOCK <= index < after) for index in range(count)]
    return list(partition_balanced(weights, stages))
