"""NeoX's batch sampler, for scripts that use it; training itself computes positions."""

import itertools
from collections.abc import Collection, Iterator

__all__ = ["DistributedBatchSampler"]


class DistributedBatchSampler:
    """Yields, per micro step, the dataset indices that one data-parallel rank reads.

    Works as ``batch_sampler`` of a torch DataLoader. The first pass begins at batch
    ``start_iter``, later ones at 0; a rest too short for all ranks is dropped.

    Args:
        sampler: dataset indices, with a length.
        batch_size: samples of all ranks together in one micro step.
        drop_last: must be true.
        rank: data-parallel rank.
        world_size: data-parallel ranks.
    """

    def __init__(
        self,
        sampler: Collection[int],
        batch_size: int,
        drop_last: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not drop_last:
            raise ValueError("drop_last=False would give the ranks batches of different sizes")
        if batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of world_size {world_size}, "
                f"and rank {rank} one of it"
            )
        self.sampler = sampler
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_iter = 0

    def __iter__(self) -> Iterator[list[int]]:
        skipped, self.start_iter = self.start_iter * self.batch_size, 0
        indices = itertools.islice(self.sampler, skipped, None)
        slice_size = self.batch_size // self.world_size
        begin = self.rank * slice_size
        while len(batch := list(itertools.islice(indices, self.batch_size))) == self.batch_size:
            yield batch[begin : begin + slice_size]

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size
