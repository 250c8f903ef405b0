"""What one data-parallel rank reads, micro batch after micro batch, without end.

Which samples a micro batch holds is arithmetic on a position (`BatchGeometry`), so starting at
step 143,000 costs what starting at step 1 costs, and nothing of what was read is kept. Threads
read ahead; the order of micro batches does not depend on how many.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import DatasetError
from megatron.config.batch_geometry import BatchGeometry

__all__ = ["MicroBatchLoader", "SampleReader"]

_READ_AHEAD_PER_WORKER = 2  # micro batches; one being read, one ready


class SampleReader(Protocol):
    """Anything that has samples at positions; `megatron.stream` has the real ones."""

    def read(self, positions: NDArray[np.int64], /) -> NDArray[Any]:
        """Return the samples at ``positions``, shape (len(positions), seq_length + 1)."""
        ...


class MicroBatchLoader:
    """An endless iterator over the micro batches of one data-parallel rank.

    Yields arrays of shape (micro_batch_size, seq_length + 1) in the dataset's own type. They are
    the caller's; the loader keeps no reference. No random generator is touched.

    Args:
        stream: where samples are read; its ``read`` is called from several threads at once.
        geometry: how a global batch is divided.
        data_parallel_rank: whose samples are read.
        first_position: stream position of the first sample of the first step, over all ranks.
        num_workers: threads that read ahead; 0 reads when asked.
        first_step: number of the step that begins at ``first_position``, for messages only.
    """

    def __init__(
        self,
        stream: SampleReader,
        geometry: BatchGeometry,
        data_parallel_rank: int,
        first_position: int,
        num_workers: int,
        *,
        first_step: int = 1,
    ) -> None:
        if not 0 <= data_parallel_rank < geometry.data_parallel_size:
            raise ValueError(
                f"data-parallel rank must be in 0..{geometry.data_parallel_size - 1}, "
                f"got {data_parallel_rank}"
            )
        if first_position < 0 or num_workers < 0:
            raise ValueError(
                f"first_position and num_workers must be >= 0, got {first_position}, {num_workers}"
            )
        self._stream = stream
        self._geometry = geometry
        self._data_parallel_rank = data_parallel_rank
        self._first_position = first_position
        self._first_step = first_step
        self._next_micro_step = 0  # the next one to hand out
        self._failure: DatasetError | None = None
        self._closed = False
        self._pending: deque[Future[NDArray[Any]]] = deque()
        self._read_ahead = num_workers * _READ_AHEAD_PER_WORKER
        self._executor = (
            ThreadPoolExecutor(num_workers, thread_name_prefix="micro-batch")
            if num_workers
            else None
        )

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return self

    def __next__(self) -> NDArray[Any]:
        """Return the next micro batch.

        Raises:
            DatasetError: reading failed; the message names step, micro step, rank and positions.
                Every later call raises it again, so that no micro batch can be missed.
            ValueError: the loader is closed.
        """
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise ValueError("this loader is closed")
        try:
            tokens = self._read_next()
        except Exception as error:  # whatever a stream raises, the place must be added
            self._failure = self._explain(error)
            self.close()
            raise self._failure from error
        self._next_micro_step += 1
        return tokens

    def close(self) -> None:
        """Stop reading ahead. Reads in progress finish; their samples are dropped."""
        self._closed = True
        self._pending.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read_next(self) -> NDArray[Any]:
        if self._executor is None:
            return self._read(self._next_micro_step)
        while len(self._pending) < self._read_ahead:
            micro_step = self._next_micro_step + len(self._pending)
            self._pending.append(self._executor.submit(self._read, micro_step))
        return self._pending.popleft().result()

    def _read(self, micro_step: int) -> NDArray[Any]:
        return self._stream.read(self._positions(micro_step))

    def _positions(self, micro_step: int) -> NDArray[np.int64]:
        start = self._first_position + self._geometry.first_position(
            micro_step, self._data_parallel_rank
        )
        return np.arange(start, start + self._geometry.micro_batch_size, dtype=np.int64)

    def _explain(self, error: Exception) -> DatasetError:
        micro_step = self._next_micro_step
        step, micro_step_of_step = divmod(micro_step, self._geometry.gradient_accumulation_steps)
        positions = self._positions(micro_step)
        return DatasetError(
            f"step {self._first_step + step}, micro step {micro_step_of_step}, data-parallel rank "
            f"{self._data_parallel_rank}: stream positions {positions[0]}..{positions[-1]} cannot "
            f"be read: {type(error).__name__}: {error}"
        )
