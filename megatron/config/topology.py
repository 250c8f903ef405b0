"""Where every rank stands in the grid of pipeline, data and tensor parallelism."""

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["RankCoordinates", "Topology"]


@dataclass(frozen=True, order=True)
class RankCoordinates:
    """One rank's place; each index counts from 0."""

    pipeline_stage: int
    data_parallel_rank: int
    tensor_parallel_rank: int


@dataclass(frozen=True)
class Topology:
    """How ``world_size`` ranks are divided; the tensor axis is the fastest, the pipeline the last.

    This is NeoX's order and that of DeepSpeed's PipeModelDataParallelTopology, so that
    ``rank = (stage * data size + data rank) * tensor size + tensor rank``.

    Example:
        >>> topology = Topology(
        ...     pipeline_parallel_size=2, data_parallel_size=1, tensor_parallel_size=2
        ... )
        >>> topology.world_size
        4
        >>> topology.coordinates(3)
        RankCoordinates(pipeline_stage=1, data_parallel_rank=0, tensor_parallel_rank=1)
    """

    pipeline_parallel_size: int  # stages, at least 1
    data_parallel_size: int
    tensor_parallel_size: int
    uses_pipeline_engine: bool = True  # False: NeoX's pipe_parallel_size 0, a sequential module

    def __post_init__(self) -> None:
        sizes = (self.pipeline_parallel_size, self.data_parallel_size, self.tensor_parallel_size)
        if min(sizes) < 1:
            raise ValueError(f"parallel sizes must be at least 1, got {sizes}")
        if not self.uses_pipeline_engine and self.pipeline_parallel_size != 1:
            raise ValueError("a topology without the pipeline engine has exactly one stage")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline_parallel_size * self.data_parallel_size * self.tensor_parallel_size

    def coordinates(self, rank: int) -> RankCoordinates:
        """Return the place of a global ``rank``.

        Raises:
            ValueError: ``rank`` is outside of the world.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a world of {self.world_size}")
        rest, tensor_parallel_rank = divmod(rank, self.tensor_parallel_size)
        pipeline_stage, data_parallel_rank = divmod(rest, self.data_parallel_size)
        return RankCoordinates(pipeline_stage, data_parallel_rank, tensor_parallel_rank)

    def rank(self, place: RankCoordinates) -> int:
        """Return the global rank at ``place``; the inverse of :meth:`coordinates`."""
        row = place.pipeline_stage * self.data_parallel_size + place.data_parallel_rank
        return row * self.tensor_parallel_size + place.tensor_parallel_rank

    def ranks(self) -> Iterator[tuple[int, RankCoordinates]]:
        """Yield every (rank, place), so that one process can check the arithmetic of all."""
        for rank in range(self.world_size):
            yield rank, self.coordinates(rank)

    def reads_data(self, place: RankCoordinates) -> bool:
        """Whether the rank at ``place`` reads data: tensor rank 0 of the first and last stage."""
        is_end = place.pipeline_stage in (0, self.pipeline_parallel_size - 1)
        return place.tensor_parallel_rank == 0 and is_end

    def model_file_rank(self, place: RankCoordinates) -> int:
        """Return XX of ``mp_rank_XX_model_states.pt``: stage * tensor size + tensor rank."""
        return place.pipeline_stage * self.tensor_parallel_size + place.tensor_parallel_rank
