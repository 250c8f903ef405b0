"""The tensor and data axes in the words DeepSpeed asks a Megatron-style ``mpu`` with."""

from typing import Any

from megatron.engine.distributed import ProcessGroups

__all__ = ["TensorParallelUnit"]


class TensorParallelUnit:
    """Answers DeepSpeed's questions about tensor and data parallelism.

    DeepSpeed's own grid calls stages and tensor ranks together "model parallel", which is right for
    its pipeline engine; activation checkpointing and the engine without a pipeline mean the tensor
    ranks alone.
    """

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups

    def get_tensor_model_parallel_group(self) -> Any:
        return self._groups.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.place.tensor_parallel_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.topology.tensor_parallel_size

    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size

    def get_data_parallel_group(self) -> Any:
        return self._groups.data

    def get_data_parallel_rank(self) -> int:
        return self._groups.place.data_parallel_rank

    def get_data_parallel_world_size(self) -> int:
        return self._groups.topology.data_parallel_size
