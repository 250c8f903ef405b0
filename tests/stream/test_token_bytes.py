"""A dataset cut into shards, anywhere, reads as one."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import DatasetError
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.shard_layout import find_shards
from megatron.stream.token_bytes import TokenBytes
from tests.stream.recorded import GOLDEN, write_dataset


def cut(prefix, cuts):
    """Replace ``prefix.bin`` by shards that end at the byte offsets ``cuts``."""
    with open(prefix + ".bin", "rb") as file:
        content = file.read()
    os.unlink(prefix + ".bin")
    bounds = [0, *sorted(cuts), len(content)]
    last = len(bounds) - 2
    for index in range(last + 1):
        with open(f"{prefix}-{index:05d}-of-{last:05d}.bin", "wb") as file:
            file.write(content[bounds[index] : bounds[index + 1]])


@given(cuts=st.lists(st.integers(0, 36), max_size=6))
def test_documents_are_the_same_wherever_the_cuts_are(tmp_path_factory, cuts):
    prefix = write_dataset(tmp_path_factory.mktemp("cut") / "t", GOLDEN["docs"])
    cut(prefix, cuts)
    dataset = IndexedDataset(prefix)
    assert [document.tolist() for document in dataset] == GOLDEN["docs"]
    assert dataset.get(0, length=18).tobytes().hex() == GOLDEN["bin_hex"]


@given(
    cuts=st.lists(st.integers(0, 200), max_size=5),
    spans=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=12),
)
def test_gathering_spans_equals_slicing_the_whole(tmp_path_factory, cuts, spans):
    content = bytes(range(200))
    paths = []
    bounds = [0, *sorted(cuts), 200]
    folder = tmp_path_factory.mktemp("gather")
    for index in range(len(bounds) - 1):
        paths.append(folder / f"{index}")
        paths[-1].write_bytes(content[bounds[index] : bounds[index + 1]])
    tokens = TokenBytes.of_files(paths)
    starts = np.array([min(span) for span in spans], dtype=np.int64)
    sizes = np.array([max(span) for span in spans], dtype=np.int64) - starts
    out = np.zeros(int(sizes.sum()), dtype=np.uint8)
    tokens.gather(starts, np.cumsum(sizes) - sizes, sizes, out)
    assert out.tobytes() == b"".join(content[min(span) : max(span)] for span in spans)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_spans_outside_are_refused(tmp_path, num_shards):
    for index in range(num_shards):
        (tmp_path / str(index)).write_bytes(b"0123456789")
    tokens = TokenBytes.of_files([tmp_path / str(index) for index in range(num_shards)])
    out = np.zeros(8, dtype=np.uint8)
    for start, target, size in [(tokens.size - 4, 0, 8), (-1, 0, 4), (0, 4, 8), (0, -1, 2)]:
        with pytest.raises(ValueError, match="a span leaves"):
            tokens.gather(np.array([start]), np.array([target]), np.array([size]), out)


def test_shards_of_two_cuts_are_refused(tmp_path):
    prefix = write_dataset(tmp_path / "t", GOLDEN["docs"])
    cut(prefix, [10, 20])
    (tmp_path / "t-00000-of-00001.bin").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"different cuts \(-of-00001 and -of-00002\)"):
        IndexedDataset(prefix)


def test_neighbours_with_longer_names_are_not_shards(tmp_path):
    for name in ("t-more-00000-of-00000.bin", "t-0-of-1.bin", "tt-00000-of-00000.bin"):
        (tmp_path / name).write_bytes(b"")
    assert find_shards(str(tmp_path / "t")) == []


def test_shards_of_the_wrong_total_size_are_refused(tmp_path):
    prefix = write_dataset(tmp_path / "t", GOLDEN["docs"])
    cut(prefix, [10])
    with open(f"{prefix}-00001-of-00001.bin", "ab") as file:
        file.write(b"xx")
    with pytest.raises(DatasetError, match=r"the shards of .*t: 38 bytes, longer than the 36"):
        IndexedDataset(prefix)
