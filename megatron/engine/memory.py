"""What a rank's memory holds, reckoned from shapes. An estimate: kernels' scratch isn't in it."""

import math
from dataclasses import dataclass

from megatron.model.parameter_shapes import Shapes
from megatron.model.settings import ModelSettings

__all__ = ["Memory", "TrainingShape", "memory_of_stage"]

_HALF, _SINGLE = 2, 4  # bytes


@dataclass(frozen=True)
class TrainingShape:
    """What memory depends on besides the model."""

    micro_batch_size: int
    tensor_parallel_size: int
    data_parallel_size: int
    micro_batches_in_flight: int  # whose activations a stage keeps at once
    is_half: bool  # fp16 or bf16
    zero_stage: int
    recomputes: bool  # checkpoint_activations

    @property
    def element_bytes(self) -> int:
        """Of a parameter, a gradient or an activation."""
        return _HALF if self.is_half else _SINGLE


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int  # Adam: two moments, and fp32 masters of half-precision parameters
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def memory_of_stage(
    layers: dict[int, Shapes], settings: ModelSettings, shape: TrainingShape
) -> Memory:
    """Return what a rank of a pipeline stage holds.

    ZeRO 1 divides the optimizer over the data-parallel ranks, 2 the gradients too, 3 also the
    parameters. Activations of a block are s·b·h·(10 + 24/t) bytes in half precision without
    attention scores, which no kernel here keeps; with recomputation a block keeps its input, and
    one block at a time all. Source: Korthikanti et al., 2022 (arXiv:2205.05198), equation 2.

    Args:
        layers: parameters of the stage on one tensor rank, by layer number.
        settings: the model.
        shape: of the training.
    """
    count = sum(math.prod(one) for shapes in layers.values() for one in shapes.values())
    width = shape.element_bytes
    ranks = shape.data_parallel_size

    def divided(size: int, *, from_stage: int) -> int:
        return -(-size // ranks) if shape.zero_stage >= from_stage else size

    per_parameter = 3 * _SINGLE if shape.is_half else 2 * _SINGLE
    return Memory(
        parameters=divided(count * width, from_stage=3),
        gradients=divided(count * width, from_stage=2),
        optimizer=divided(count * per_parameter, from_stage=1),
        activations=_activations(layers, settings, shape),
    )


def _activations(layers: dict[int, Shapes], settings: ModelSettings, shape: TrainingShape) -> int:
    tokens = settings.seq_length * shape.micro_batch_size
    scale = 1 if shape.is_half else 2
    one_block = scale * tokens * settings.hidden_size * (10 + 24 // shape.tensor_parallel_size)
    blocks = sum("mlp.linear1.weight" in shapes for shapes in layers.values())
    if shape.recomputes:
        kept = blocks * scale * _HALF * tokens * settings.hidden_size
        total = kept * shape.micro_batches_in_flight + (one_block if blocks else 0)
    else:
        total = blocks * one_block * shape.micro_batches_in_flight
    # Logits, and their fp32 copy in the loss.
    heads = [
        shapes["final_linear.weight"]
        for shapes in layers.values()
        if "final_linear.weight" in shapes
    ]
    rows = heads[0][0] if heads else 0
    return total + tokens * rows * (_SINGLE + shape.element_bytes)
