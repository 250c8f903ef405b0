"""Shards cut anywhere, joined again, and checked against lists of sums."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.base.errors import DatasetError
from megatron.data.shard_files import check_files, cut_dataset, join_dataset, read_checksums
from megatron.stream.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from tools.datasets import shard


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "corpus_text_document"
    random = np.random.RandomState(3)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(50):
        builder.add_item(random.randint(0, 60000, random.randint(1, 90)).astype(np.uint16))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("num_shards", [133, 83, 21])
def test_shards_hold_the_same_documents_and_join_to_the_same_file(whole, tmp_path, num_shards):
    size = IndexedDataset(whole).tokens.size
    shard_bytes = -(-size // num_shards)
    sums = cut_dataset(whole, tmp_path / "cut", shard_bytes)
    bins = sorted(path.name for path in tmp_path.glob("*.bin"))
    assert bins[0] == f"cut-00000-of-{num_shards - 1:05d}.bin"
    assert (len(bins), set(sums)) == (num_shards, {*bins, "cut.idx"})
    pieces = [(tmp_path / name).read_bytes() for name in bins]
    assert {len(piece) for piece in pieces[:-1]} == {shard_bytes}
    assert b"".join(pieces) == whole.with_suffix(".bin").read_bytes()
    for number, document in enumerate(IndexedDataset(whole)[:]):
        assert np.array_equal(IndexedDataset(tmp_path / "cut")[number], document)
    join_dataset(tmp_path / "cut", tmp_path / "joined")
    for suffix in (".bin", ".idx"):
        joined = (tmp_path / "joined").with_suffix(suffix)
        assert joined.read_bytes() == whole.with_suffix(suffix).read_bytes()


@settings(max_examples=12, deadline=None)
@given(shard_bytes=st.integers(101, 9000), again=st.integers(101, 9000))
def test_shards_cut_again_are_those_cut_at_once(whole, tmp_path_factory, shard_bytes, again):
    folder = tmp_path_factory.mktemp("cuts")
    cut_dataset(whole, folder / "first", shard_bytes)
    cut_dataset(folder / "first", folder / "again", again)
    sums = cut_dataset(whole, folder / "direct", again)
    of_again = {name.replace("direct", "again"): digest for name, digest in sums.items()}
    assert check_files(folder, of_again) == ([], [])


def test_an_existing_dataset_is_never_overwritten(whole, tmp_path):
    cut_dataset(whole, tmp_path / "cut", 500)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DatasetError, match=r"cut-00000-of-\d+.bin exists already"):
        cut_dataset(whole, tmp_path / "cut", 900)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failure_leaves_nothing_behind(whole, tmp_path):
    def fail(done, total):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cut_dataset(whole, tmp_path / "cut", 500, fail)
    assert list(tmp_path.iterdir()) == []


def test_empty_shards_are_refused(whole, tmp_path):
    with pytest.raises(DatasetError, match="a shard of 0 bytes is not possible"):
        cut_dataset(whole, tmp_path / "cut", 0)


def test_lists_of_both_kinds_are_read(tmp_path):
    digest = hashlib.sha256(b"x").hexdigest()
    path = tmp_path / "list"
    path.write_text(f"a.bin {digest}\n{digest}  b c.bin\n{digest} *d.bin")
    assert read_checksums(path) == dict.fromkeys(["a.bin", "b c.bin", "d.bin"], digest)
    path.write_text("a.bin 123\n")
    with pytest.raises(DatasetError, match=r"list:1: not a file name with its SHA-256"):
        read_checksums(path)


def test_verify_names_missing_and_changed_files_and_exits_1(whole, tmp_path, capsys):
    shard.main(["cut", str(whole), str(tmp_path / "cut"), "--bytes", "2000"])
    sums = tmp_path / "cut.sha256"
    assert shard.main(["verify", str(sums)]) == 0
    first, second, *_ = sorted(tmp_path.glob("*.bin"))
    first.unlink()
    content = bytearray(second.read_bytes())
    content[17] ^= 1
    second.write_bytes(content)
    capsys.readouterr()
    assert shard.main(["verify", str(sums)]) == 1
    output = capsys.readouterr().out
    assert f"missing    {first}" in output
    assert f"different  {second}" in output
