"""Datasets on disk: NeoX's bytes, NeoX's reader interface, and errors that say what is wrong."""

import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import DatasetError
from megatron.stream.index_file import DTYPE_CODES
from megatron.stream.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, dataset_exists
from tests.stream.recorded import DATA, GOLDEN, write_dataset

DOCUMENTS = GOLDEN["docs"]


@pytest.fixture
def prefix(tmp_path):
    return write_dataset(tmp_path / "t", DOCUMENTS)


def test_written_bytes_are_neoxs(prefix):
    with open(prefix + ".bin", "rb") as tokens, open(prefix + ".idx", "rb") as index:
        assert tokens.read().hex() == GOLDEN["bin_hex"]
        assert index.read().hex() == GOLDEN["idx_hex"]


def test_neoxs_files_are_read():
    dataset = IndexedDataset(DATA / "golden" / "t")
    assert dataset.dtype == np.uint16
    assert dataset.sizes.tolist() == GOLDEN["sizes"]
    assert dataset.pointers.tolist() == GOLDEN["pointers"]
    assert dataset.doc_idx.tolist() == GOLDEN["doc_idx_arr"]
    assert [document.tolist() for document in dataset] == DOCUMENTS


def test_documents_by_number_slice_and_offset(prefix):
    dataset = IndexedDataset(prefix)
    assert len(dataset) == 5
    assert dataset[-1].tolist() == [12, 13, 0]
    assert dataset[np.int64(1)].tolist() == [4, 5, 0]
    assert [document.tolist() for document in dataset[1:3]] == [[4, 5, 0], [6, 0]]
    assert dataset.get(3, offset=2).tolist() == [9, 10, 11, 0]
    assert dataset.get(3, offset=2, length=2).tolist() == [9, 10]


def test_reading_past_a_documents_end_goes_on_into_the_next(prefix):
    assert IndexedDataset(prefix).get(0, offset=3, length=3).tolist() == [0, 4, 5]


def test_out_of_range_requests_fail(prefix):
    dataset = IndexedDataset(prefix)
    with pytest.raises(IndexError, match="document 5 of 5"):
        dataset[5]
    with pytest.raises(ValueError, match="not with step 2"):
        dataset[::2]
    with pytest.raises(ValueError, match=r"bytes 30\.\.38 are outside of 0\.\.36"):
        dataset.get(4, length=4)


def test_a_dataset_pickles_by_its_path(prefix):
    again = pickle.loads(pickle.dumps(IndexedDataset(prefix)))
    assert again.prefix == prefix
    assert again[0].tolist() == DOCUMENTS[0]


def test_doc_idx_can_be_replaced_in_memory(prefix):
    dataset = IndexedDataset(prefix)
    dataset.set_doc_idx(np.array([0, 2, 5]))
    assert dataset.get_doc_idx().tolist() == [0, 2, 5]


@given(
    documents=st.lists(st.lists(st.integers(0, 100), max_size=7), max_size=9),
    dtype=st.sampled_from(sorted(DTYPE_CODES.values(), key=str)),
)
def test_whatever_is_written_is_read_back(tmp_path_factory, documents, dtype):
    prefix = write_dataset(tmp_path_factory.mktemp("any") / "d", documents, dtype)
    dataset = IndexedDataset(prefix, warm_up=True)
    assert [document.tolist() for document in dataset] == documents
    assert dataset.dtype == dtype


def test_merging_appends_items_but_not_doc_idx(tmp_path, prefix):
    other = write_dataset(tmp_path / "u", [[21, 22], [], [23]])
    builder = IndexedDatasetBuilder(tmp_path / "merged.bin", np.uint16)
    builder.merge_file_(prefix)
    builder.merge_file_(other)
    builder.finalize(tmp_path / "merged.idx")
    merged = IndexedDataset(tmp_path / "merged")
    assert [document.tolist() for document in merged] == [*DOCUMENTS, [21, 22], [], [23]]
    assert merged.doc_idx.tolist() == [0]


def test_merging_another_type_fails(tmp_path, prefix):
    builder = IndexedDatasetBuilder(tmp_path / "wide.bin", np.int32)
    with pytest.raises(DatasetError, match=r"t holds uint16 and cannot be merged .* of int32"):
        builder.merge_file_(prefix)


def test_tokens_of_another_type_are_refused(tmp_path):
    builder = IndexedDatasetBuilder(tmp_path / "d.bin", np.uint16)
    with pytest.raises(TypeError, match="holds uint16, got tokens of int64"):
        builder.add_item(np.array([1, 2]))


def test_a_type_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokens cannot be stored as uint64"):
        IndexedDatasetBuilder(tmp_path / "d.bin", np.uint64)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ([".bin"], r"t\.bin does not exist"),
        ([".idx"], r"t\.idx does not exist"),
        ([".bin", ".idx"], r"t\.idx and .*t\.bin do not exist; .* without \.bin and \.idx"),
    ],
)
def test_a_missing_file_is_named(prefix, missing, message):
    for suffix in missing:
        os.unlink(prefix + suffix)
    assert not dataset_exists(prefix)
    with pytest.raises(DatasetError, match=message):
        IndexedDataset(prefix)[0]


def _edit(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def test_a_truncated_index_tells_both_sizes(prefix):
    os.truncate(prefix + ".idx", 100)
    with pytest.raises(
        DatasetError,
        match=r"truncated: 100 bytes, but 5 sizes and pointers and 6 document indices take 142",
    ):
        IndexedDataset(prefix)


def test_an_index_cut_inside_its_header_is_truncated(prefix):
    os.truncate(prefix + ".idx", 20)
    with pytest.raises(DatasetError, match="truncated: 20 bytes, the header alone has 34"):
        IndexedDataset(prefix)


def test_an_index_with_more_bytes_than_declared_is_refused(prefix):
    with open(prefix + ".idx", "ab") as file:
        file.write(b"x")
    with pytest.raises(DatasetError, match="longer than its header says: 143 bytes"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something else entirely, long enough......"])
def test_a_file_of_another_format_is_no_index(prefix, content):
    with open(prefix + ".idx", "wb") as file:
        file.write(content)
    with pytest.raises(DatasetError, match="not a dataset index: it begins with"):
        IndexedDataset(prefix)


def test_the_legacy_format_is_refused_by_name(prefix):
    _edit(prefix + ".idx", 0, b"TNTIDX\x00\x00")
    with pytest.raises(DatasetError, match=r"legacy TNTIDX format .* tokenize again"):
        IndexedDataset(prefix)


def test_another_version_is_refused(prefix):
    _edit(prefix + ".idx", 9, struct.pack("<Q", 2))
    with pytest.raises(DatasetError, match="version 2 of the format; only 1 is known"):
        IndexedDataset(prefix)


def test_an_unknown_type_code_is_refused(prefix):
    _edit(prefix + ".idx", 17, b"\x0c")
    with pytest.raises(DatasetError, match=r"dtype code 12 is unknown; known are 1\.\.8"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(("size", "relation"), [(30, "shorter"), (38, "longer")])
def test_tokens_that_do_not_fit_the_index_tell_both_sizes(prefix, size, relation):
    os.truncate(prefix + ".bin", size)
    with pytest.raises(
        DatasetError,
        match=rf"t\.bin: {size} bytes, {relation} than the 36 .*5 documents of uint16",
    ):
        IndexedDataset(prefix)
