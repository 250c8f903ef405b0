"""What one data-parallel rank reads, micro batch after micro batch, without end.

Which samples a micro batch holds is arithmetic on a position (`BatchGeometry`), so starting at
step 143,000 costs what starting at step 1 costs, and nothing of what was read is kept.

Several micro batches are read at once, a *block*: finding samples is vectorised, and a call per
micro batch would cost more than the reading. The first block is one micro batch and the next ones
grow, so that the first comes soon. Threads read blocks ahead; the order of micro batches depends
neither on them nor on blocks.
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

_BLOCK_SAMPLES = 256  # at most, unless a micro batch has more; 1 MiB at 2048 tokens of 2 bytes
_BLOCKS_AHEAD_PER_WORKER = 2  # one being read, one ready


class SampleReader(Protocol):
    """Anything that has samples at positions; `megatron.stream` has the real ones."""

    def read(self, positions: NDArray[np.int64], /) -> NDArray[Any]:
        """Return the samples at ``positions``, shape (len(positions), seq_length + 1); with labels
        (len(positions), 2, seq_length + 1), tokens first.
        """
        ...


class MicroBatchLoader:
    """An endless iterator over the micro batches of one data-parallel rank.

    Yields arrays of shape (micro_batch_size, seq_length + 1), with labels (micro_batch_size, 2,
    seq_length + 1), in the type the stream reads. They are the caller's; the loader keeps nothing
    of what it has handed out. No random generator is touched.

    Args:
        stream: where samples are read; its ``read`` is called from several threads at once.
        geometry: how a global batch is divided.
        data_parallel_rank: whose samples are read.
        first_position: stream position of the first sample of the first step, over all ranks.
        num_workers: threads that read ahead; 0 reads when asked.
        first_step: number of the step that begins at ``first_position``, for messages only.
        stop_position: nothing from here on is read ahead (a run's end, after which reading may
            be dear); what is asked for is read all the same.
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
        stop_position: int | None = None,
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
        self._stop_micro_step = (
            None
            if stop_position is None
            else -(-(stop_position - first_position) // geometry.micro_step_size)
        )
        self._next_micro_step = 0  # to hand out; micro steps count from first_position on
        self._failure: DatasetError | None = None
        self._closed = False
        self._longest_block = max(1, _BLOCK_SAMPLES // geometry.micro_batch_size)
        self._next_block_length = 1  # micro batches
        self._block_steps = range(0)  # micro steps of the block being handed out
        self._block: NDArray[Any] | None = None  # None: read its micro batches one by one
        self._ahead: deque[tuple[range, Future[NDArray[Any] | None]]] = deque()
        self._blocks_ahead = num_workers * _BLOCKS_AHEAD_PER_WORKER
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
            tokens = self._micro_batch(self._next_micro_step)
        except Exception as error:  # whatever a stream raises, the place must be added
            self._failure = self._explain(error)
            self.close()
            raise self._failure from error
        self._next_micro_step += 1
        return tokens

    def close(self) -> None:
        """Stop reading ahead. Reads in progress finish; their samples are dropped."""
        self._closed = True
        self._block = None
        self._ahead.clear()
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

    def _micro_batch(self, micro_step: int) -> NDArray[Any]:
        if micro_step not in self._block_steps:
            self._block_steps, self._block = self._take_block(micro_step)
        if self._block is None:
            return self._read(range(micro_step, micro_step + 1))[0]
        tokens = self._block[micro_step - self._block_steps.start]
        if micro_step + 1 == self._block_steps.stop:
            self._block = None
        return tokens

    def _take_block(self, micro_step: int) -> tuple[range, NDArray[Any] | None]:
        if self._executor is None:
            steps = self._block_from(micro_step)
            return steps, self._read_block(steps)
        upcoming = self._ahead[-1][0].stop if self._ahead else micro_step
        while len(self._ahead) < self._blocks_ahead:
            if self._ahead and self._is_past_stop(upcoming):
                break
            steps = self._block_from(upcoming)
            self._ahead.append((steps, self._executor.submit(self._read_block, steps)))
            upcoming = steps.stop
        steps, block = self._ahead.popleft()
        return steps, block.result()

    def _block_from(self, micro_step: int) -> range:
        stop = micro_step + self._next_block_length
        self._next_block_length = min(2 * self._next_block_length, self._longest_block)
        if self._stop_micro_step is not None:
            stop = min(stop, max(self._stop_micro_step, micro_step + 1))
        return range(micro_step, stop)

    def _is_past_stop(self, micro_step: int) -> bool:
        return self._stop_micro_step is not None and micro_step >= self._stop_micro_step

    def _read_block(self, steps: range) -> NDArray[Any] | None:
        try:
            return self._read(steps)
        except Exception:  # noqa: BLE001 - reading one by one tells which micro batch is to blame
            return None

    def _read(self, steps: range) -> NDArray[Any]:
        samples = self._stream.read(self._positions(steps))
        # (micro steps, micro_batch_size, seq_length + 1), or with labels (..., 2, seq_length + 1)
        return samples.reshape(len(steps), self._geometry.micro_batch_size, *samples.shape[1:])

    def _positions(self, steps: range) -> NDArray[np.int64]:
        starts = [
            self._first_position
            + self._geometry.first_position(micro_step, self._data_parallel_rank)
            for micro_step in steps
        ]
        rows = np.arange(self._geometry.micro_batch_size, dtype=np.int64)
        return (np.array(starts, dtype=np.int64)[:, None] + rows).reshape(-1)

    def _explain(self, error: Exception) -> DatasetError:
        micro_step = self._next_micro_step
        step, micro_step_of_step = divmod(micro_step, self._geometry.gradient_accumulation_steps)
        positions = self._positions(range(micro_step, micro_step + 1))
        return DatasetError(
            f"step {self._first_step + step}, micro step {micro_step_of_step}, data-parallel rank "
            f"{self._data_parallel_rank}: stream positions {positions[0]}..{positions[-1]} cannot "
            f"be read: {type(error).__name__}: {error}"
        )
