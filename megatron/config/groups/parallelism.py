"""Keys that divide the model over ranks."""

from dataclasses import dataclass

from megatron.config.declare import WORKS, key, no_effect, refused

__all__ = ["Parallelism"]


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """Pipeline, tensor and data parallelism. Data-parallel size is what is left of the ranks."""

    pipe_parallel_size: int | None = key(0, unit="stages", minimum=0, outcome=WORKS)
    """Pipeline stages. 0 is a plain sequential module without DeepSpeed's pipeline engine, 1 that
    engine with one stage."""

    model_parallel_size: int | None = key(1, unit="ranks", outcome=WORKS)
    """Ranks over which every layer's tensors are split. Below 1 counts as 1."""

    pipe_partition_method: str | None = key("type:transformer|mlp", outcome=WORKS)
    """How layers are spread over stages: ``uniform`` by number, ``parameters`` by size,
    ``type:REGEX`` by number of layers whose class name matches."""

    world_size: int | None = key(
        None, is_derived=True, outcome=no_effect("the launcher decides it")
    )
    """Number of ranks; not for configuration files, see ``num_gpus`` and ``hostfile``."""

    is_pipe_parallel: bool | None = key(False, is_derived=True, outcome=WORKS)
    """Whether ``pipe_parallel_size`` is at least 1."""

    sequence_parallel: bool | None = key(
        False, tier=2, outcome=refused("set it to false; the numbers are the same")
    )
    """Split activations between tensor-parallel regions along the sequence, to save memory."""
