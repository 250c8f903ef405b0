"""The loader: which samples, in which order, kept by whom, and what happens when reading fails."""

import gc
import random
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import DatasetError
from megatron.config.batch_geometry import BatchGeometry
from megatron.data.loader import MicroBatchLoader

SAMPLE = 5  # tokens of a sample


class NumberedSamples:
    """Sample p is p, p+1, ... modulo the storage type; endless like a real stream."""

    def __init__(self, fail_at=None, delay_s=None):
        self.read_positions = []
        self.fail_at = fail_at
        self.delay_s = delay_s

    def read(self, positions):
        self.read_positions.append(positions)
        if self.delay_s is not None:
            time.sleep(self.delay_s(int(positions[0])))
        if self.fail_at is not None and self.fail_at in positions:
            raise OSError(f"sample {self.fail_at} lies on a broken disk")
        return (positions[:, None] + np.arange(SAMPLE)).astype(np.uint16)


geometries = st.builds(
    BatchGeometry,
    micro_batch_size=st.integers(1, 4),
    data_parallel_size=st.integers(1, 4),
    gradient_accumulation_steps=st.integers(1, 3),
)


def take(loader, count):
    return [next(loader) for _ in range(count)]


@given(geometries, st.integers(0, 2**40), st.integers(0, 3))
def test_ranks_together_read_every_position_once_in_neoxs_order(geometry, first, num_workers):
    num_micro_steps = 2 * geometry.gradient_accumulation_steps
    streams = [NumberedSamples() for _ in range(geometry.data_parallel_size)]
    batches = []
    for rank, stream in enumerate(streams):
        with MicroBatchLoader(stream, geometry, rank, first, num_workers) as loader:
            batches.append(take(loader, num_micro_steps))
    # (micro step, rank, row): positions run over rows, then ranks, then micro steps
    read = np.concatenate(
        [batches[rank][step] for step in range(num_micro_steps) for rank in range(len(streams))]
    )
    positions = first + np.arange(2 * geometry.global_batch_size)
    assert np.array_equal(read, NumberedSamples().read(positions))


@given(geometries, st.integers(0, 4), st.integers(0, 10**9))
def test_starting_at_a_step_equals_having_run_to_it(geometry, num_steps, first):
    def loader_at(position):
        return MicroBatchLoader(NumberedSamples(), geometry, 0, position, 0)

    walked = loader_at(first)
    take(walked, num_steps * geometry.gradient_accumulation_steps)
    jumped = loader_at(first + num_steps * geometry.global_batch_size)
    assert np.array_equal(take(walked, 3), take(jumped, 3))


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_order_and_type_do_not_depend_on_workers(num_workers):
    slow_then_fast = NumberedSamples(delay_s=lambda first: 0.01 if first % 512 == 0 else 0.0)
    geometry = BatchGeometry(128, 1, 1)
    with MicroBatchLoader(slow_then_fast, geometry, 0, 0, num_workers) as loader:
        batches = take(loader, 40)
    assert np.concatenate(batches)[:, 0].tolist() == list(range(40 * 128))
    assert {batch.dtype for batch in batches} == {np.dtype(np.uint16)}


def test_starting_far_in_reads_nothing_of_what_lies_before():
    stream = NumberedSamples()
    first = next(MicroBatchLoader(stream, BatchGeometry(8, 128, 1), 5, 143_000 * 1024, 0))
    assert np.array_equal(first, NumberedSamples().read(143_000 * 1024 + 40 + np.arange(8)))
    (read,) = stream.read_positions
    assert read.tolist() == list(range(143_000 * 1024 + 40, 143_000 * 1024 + 48))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_was_handed_out_is_not_kept(num_workers):
    memory = []
    with MicroBatchLoader(NumberedSamples(), BatchGeometry(4, 1, 1), 0, 0, num_workers) as loader:
        for _ in range(63 + 5 * 64):  # blocks of 1, 2, 4, ... 32 and five of 64
            batch = next(loader)
            memory.append(weakref.ref(batch if batch.base is None else batch.base))
        del batch
        gc.collect()
        assert [block for block in memory if block() is not None] == []


def test_reading_ahead_is_bounded():
    stream = NumberedSamples()
    with MicroBatchLoader(stream, BatchGeometry(128, 1, 1), 0, 0, num_workers=2) as loader:
        take(loader, 3)
        time.sleep(0.05)
        assert 3 * 128 < sum(map(len, stream.read_positions)) <= 3 * 128 + 2 * 2 * 256


@given(geometries, st.integers(0, 40), st.integers(0, 1000), st.integers(0, 2))
def test_nothing_past_the_stop_is_read_before_it_is_asked_for(
    geometry, num_steps, first, num_workers
):
    stop = first + num_steps * geometry.global_batch_size
    stream = NumberedSamples()
    micro_steps = num_steps * geometry.gradient_accumulation_steps
    with MicroBatchLoader(stream, geometry, 0, first, num_workers, stop_position=stop) as loader:
        take(loader, micro_steps)
    assert max((positions.max() for positions in stream.read_positions), default=-1) < stop
    with MicroBatchLoader(stream, geometry, 0, first, num_workers, stop_position=stop) as loader:
        past = take(loader, micro_steps + 2)[-2:]
    assert [batch[0, 0] for batch in past] == [
        (stop + step * geometry.micro_step_size) % 65536 for step in range(2)
    ]


def test_no_global_random_generator_is_touched():
    import torch

    def states():
        kind, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), rest

    before = states()
    with MicroBatchLoader(NumberedSamples(), BatchGeometry(2, 1, 1), 0, 0, 2) as loader:
        take(loader, 5)
    assert states() == before


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_failed_read_names_its_place_and_stays_failed(num_workers):
    # 46 = ((5 * 2 + 1) * 2 + 1) * 2: step 5 counted from 0, micro step 1, rank 1, row 0
    geometry = BatchGeometry(2, 2, 2)
    stream = NumberedSamples(fail_at=46)
    loader = MicroBatchLoader(stream, geometry, 1, 0, num_workers, first_step=101)
    take(loader, 11)
    for _ in range(2):
        with pytest.raises(
            DatasetError,
            match=r"step 106, micro step 1, data-parallel rank 1: stream positions 46\.\.47 "
            r"cannot be read: OSError: sample 46 lies on a broken disk",
        ):
            next(loader)


def test_closing_ends_the_threads():
    before = threading.active_count()
    loader = MicroBatchLoader(NumberedSamples(), BatchGeometry(1, 1, 1), 0, 0, num_workers=3)
    take(loader, 4)
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="this loader is closed"):
        next(loader)


@pytest.mark.parametrize(
    ("rank", "first", "num_workers", "message"),
    [
        (2, 0, 0, "data-parallel rank must be in 0..1, got 2"),
        (0, -1, 0, "must be >= 0, got -1, 0"),
        (0, 0, -1, "must be >= 0, got 0, -1"),
    ],
)
def test_nonsense_is_refused(rank, first, num_workers, message):
    with pytest.raises(ValueError, match=message):
        MicroBatchLoader(NumberedSamples(), BatchGeometry(1, 2, 1), rank, first, num_workers)
