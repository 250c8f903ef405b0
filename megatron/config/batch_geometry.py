"""Which step, micro step, data-parallel rank and row consumes a position, and the way back.

The rule is NeoX's (micro step first, then rank, then row), so the samples of a step do not depend
on how it is divided, only who reads which of them.
"""

from dataclasses import dataclass

__all__ = ["BatchGeometry", "SampleSlot"]


@dataclass(frozen=True, order=True)
class SampleSlot:
    """Where one sample is consumed; every number counts from 0 within its segment."""

    step: int
    micro_step: int
    data_parallel_rank: int
    row: int


@dataclass(frozen=True)
class BatchGeometry:
    """How a global batch is divided. Constant within one attempt and segment.

    Example:
        >>> geometry = BatchGeometry(
        ...     micro_batch_size=2, data_parallel_size=4, gradient_accumulation_steps=3
        ... )
        >>> geometry.slot(47)
        SampleSlot(step=1, micro_step=2, data_parallel_rank=3, row=1)
        >>> geometry.position(geometry.slot(47))
        47
    """

    micro_batch_size: int  # samples one rank pushes through the model at a time
    data_parallel_size: int  # ranks
    gradient_accumulation_steps: int  # micro steps per step

    def __post_init__(self) -> None:
        sizes = (
            self.micro_batch_size,
            self.data_parallel_size,
            self.gradient_accumulation_steps,
        )
        if min(sizes) < 1:
            raise ValueError(f"batch geometry must be positive, got {sizes}")

    @property
    def global_batch_size(self) -> int:
        """Samples one step consumes over all ranks (NeoX: train_batch_size)."""
        return self.micro_step_size * self.gradient_accumulation_steps

    @property
    def micro_step_size(self) -> int:
        """Samples all ranks together consume in one micro step."""
        return self.micro_batch_size * self.data_parallel_size

    def slot(self, position: int) -> SampleSlot:
        """Return where ``position``, counted from the segment's first, is consumed.

        Raises:
            ValueError: ``position`` is negative.
        """
        if position < 0:
            raise ValueError(f"stream position must be >= 0, got {position}")
        rest, row = divmod(position, self.micro_batch_size)
        rest, data_parallel_rank = divmod(rest, self.data_parallel_size)
        step, micro_step = divmod(rest, self.gradient_accumulation_steps)
        return SampleSlot(step, micro_step, data_parallel_rank, row)

    def position(self, slot: SampleSlot) -> int:
        """Return the position consumed at ``slot``; the inverse of :meth:`slot`."""
        micro_step = slot.step * self.gradient_accumulation_steps + slot.micro_step
        return self.first_position(micro_step, slot.data_parallel_rank) + slot.row

    def first_position(self, micro_step: int, data_parallel_rank: int) -> int:
        """Return the first of the ``micro_batch_size`` consecutive positions a rank reads.

        ``micro_step`` counts from the segment's first one and runs on across steps.
        """
        return (micro_step * self.data_parallel_size + data_parallel_rank) * self.micro_batch_size
