"""The names NeoX's users import work on the same files."""

import numpy as np
import pytest

from megatron.base.errors import DatasetError
from megatron.data.indexed_dataset import (
    MMapIndexedDataset,
    infer_dataset_impl,
    make_builder,
    make_dataset,
)
from megatron.data.samplers import DistributedBatchSampler
from tests.stream.recorded import GOLDEN


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(None, np.int32), (65499, np.uint16), (65500, np.int32)]
)
def test_the_vocabulary_decides_the_storage_type(tmp_path, vocab_size, dtype):
    builder = make_builder(tmp_path / "d.bin", "mmap", vocab_size)
    assert builder.dtype == dtype
    builder.add_item(np.array([1, 2], dtype=builder.dtype))
    builder.end_document()
    builder.finalize(tmp_path / "d.idx")
    for impl in ("mmap", "infer"):
        assert make_dataset(str(tmp_path / "d"), impl)[0].tolist() == [1, 2]
    assert infer_dataset_impl(str(tmp_path / "d")) == "mmap"
    assert MMapIndexedDataset.exists(tmp_path / "d")


def test_nothing_is_inferred_from_nothing(tmp_path):
    assert infer_dataset_impl(str(tmp_path / "d")) is None


@pytest.mark.parametrize("impl", ["cached", "lazy"])
def test_the_legacy_format_is_neither_written_nor_read(tmp_path, impl):
    with pytest.raises(DatasetError, match=f"implementation '{impl}' is not supported"):
        make_builder(tmp_path / "d.bin", impl)
    with pytest.raises(DatasetError, match=f"implementation '{impl}' is not supported"):
        make_dataset(str(tmp_path / "d"), impl)


@pytest.mark.parametrize(("case", "expected"), GOLDEN["sampler"].items())
def test_batches_per_rank_equal_neoxs(case, expected):
    length, batch_size, rank, world_size, *start = eval(case)
    sampler = DistributedBatchSampler(range(length), batch_size, True, rank, world_size)
    sampler.start_iter = start[0] if start else 0
    assert [list(sampler), list(sampler), len(sampler)] == expected


def test_batches_that_ranks_cannot_share_are_refused():
    with pytest.raises(ValueError, match="batch_size 5 must be a multiple of world_size 2"):
        DistributedBatchSampler(range(10), 5, True, 0, 2)
    with pytest.raises(ValueError, match="drop_last=False"):
        DistributedBatchSampler(range(10), 4, False, 0, 2)
