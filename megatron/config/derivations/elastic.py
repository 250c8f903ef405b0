"""``elastic_batch``: the same global batch, divided for however many ranks there are.

The micro batch is the largest divisor of a rank's share that isn't above the configured one, so
that it fits into memory and takes as few micro steps as it can. A share such as 7 has no divisors
but 1 and 7: with ``train_micro_batch_size_per_gpu: 4`` it is 7 micro steps of one sample.
"""

__all__ = ["divide_batch", "nearest_rank_counts"]


def divide_batch(
    train_batch_size: int, data_parallel_size: int, *, largest_micro_batch: int
) -> tuple[int, int] | None:
    """Return micro batch and gradient accumulation; None if ranks can't have equal shares.

    Example:
        >>> divide_batch(12, 4, largest_micro_batch=2)
        (1, 3)
        >>> divide_batch(12, 3, largest_micro_batch=2)
        (2, 2)
    """
    share, rest = divmod(train_batch_size, data_parallel_size)
    if rest:
        return None
    limit = min(share, largest_micro_batch)
    micro = next(size for size in range(limit, 0, -1) if share % size == 0)
    return micro, share // micro


def nearest_rank_counts(
    train_batch_size: int, ranks: int, *, ranks_per_replica: int
) -> tuple[int, ...]:
    """Return the nearest numbers of ranks below and above ``ranks`` that the batch divides over.

    Example:
        >>> nearest_rank_counts(12, 10, ranks_per_replica=2)
        (8, 12)
        >>> nearest_rank_counts(12, 26, ranks_per_replica=2)
        (24,)
    """
    replicas = ranks / ranks_per_replica
    fitting = [size for size in range(1, train_batch_size + 1) if train_batch_size % size == 0]
    below = [size for size in fitting if size < replicas][-1:]
    above = [size for size in fitting if size > replicas][:1]
    return tuple(size * ranks_per_replica for size in (*below, *above))
