"""Index maps are NeoX's, array by array."""

import dataclasses
import hashlib
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import DatasetError
from megatron.stream.index_maps import (
    PackedShape,
    build_packed_maps,
    count_tokens,
    epochs_needed,
    sample_rows,
    shuffled_documents,
)
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.legacy_random import LegacyGenerator
from megatron.stream.sample_counts import split_documents
from tests.stream.recorded import DATA, GOLDEN, load_megatron_core_helpers

_NAME = re.compile(
    r"(?P<dataset>.+)_(?P<split>train|valid|test)(?P<whole>_\d+)?_indexmap_"
    r"(?P<num_samples>\d+|None)ns_(?P<seq_length>\d+)sl_(?P<seed>\d+)s_packedpi_ac_doc_idx\.npy"
)
_STEMS = sorted(
    path.parent / path.name.removesuffix("_doc_idx.npy") for path in DATA.glob("*/*_doc_idx.npy")
)
_SPLITS = {"corpus_a_text_document": "900,70,30", "big": "90,5,5", "t": "1"}


def shape_of(sizes, documents, seq_length, num_samples):
    tokens = count_tokens(sizes, documents)
    epochs = 1 if num_samples is None else epochs_needed(tokens, seq_length, num_samples)
    return PackedShape(documents, tokens, epochs, seq_length)


def test_the_recordings_are_there():
    assert len(_STEMS) == 19


@pytest.mark.parametrize("stem", _STEMS, ids=lambda stem: stem.name)
def test_recorded_maps_are_rebuilt_bit_for_bit(stem):
    match = _NAME.fullmatch(stem.name + "_doc_idx.npy")
    sizes = IndexedDataset(stem.parent / match["dataset"]).sizes
    documents = range(len(sizes))
    if match["whole"] is None:
        splits = split_documents(_SPLITS[match["dataset"]], len(sizes))
        documents = splits[("train", "valid", "test").index(match["split"])]
    num_samples = None if match["num_samples"] == "None" else int(match["num_samples"])
    shape = shape_of(sizes, documents, int(match["seq_length"]), num_samples)
    maps = build_packed_maps(sizes, shape, int(match["seed"]))
    for field in dataclasses.fields(maps):
        recorded = np.load(f"{stem}_{field.name}.npy")
        actual = getattr(maps, field.name)
        assert actual.dtype == recorded.dtype
        assert np.array_equal(actual, recorded), field.name


@pytest.mark.parametrize(("num_samples", "expected"), GOLDEN["packed_seq4_seed1234"].items())
def test_worked_examples(num_samples, expected):
    sizes = np.array(GOLDEN["sizes"], dtype=np.int32)
    maps = build_packed_maps(sizes, shape_of(sizes, range(5), 4, int(num_samples)), 1234)
    assert maps.doc_idx.tolist() == expected["doc_idx"]
    assert maps.sample_idx.tolist() == expected["sample_idx"]
    assert maps.shuffle_idx.tolist() == expected["shuffle_idx"]
    assert [str(array.dtype) for array in vars(maps).values()] == expected["dtypes"]


def test_the_large_example_by_its_digests():
    expected = GOLDEN["big"]
    sizes = np.random.RandomState(0).randint(1, 50, 200).astype(np.int32)
    maps = build_packed_maps(sizes, shape_of(sizes, range(200), 16, 1000), 1234)
    assert [list(array.shape) for array in vars(maps).values()] == expected["shapes"]
    for name, array in vars(maps).items():
        assert hashlib.sha256(array.tobytes()).hexdigest() == expected[f"{name}_sha"]


def slow_rows(sizes, doc_idx, seq_length):
    """Where each token of the row lies, one by one; a sample begins at every seq_length-th."""
    tokens = [(k, o) for k, doc in enumerate(doc_idx) for o in range(sizes[doc])]
    starts = tokens[seq_length::seq_length]
    return [(0, 0), *starts]


_SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any)


@given(sizes=_SIZES, seq_length=st.integers(1, 40), num_samples=st.integers(0, 200))
def test_rows_lie_seq_length_tokens_apart(sizes, seq_length, num_samples):
    sizes = np.array(sizes, dtype=np.int32)
    shape = shape_of(sizes, range(len(sizes)), seq_length, num_samples)
    maps = build_packed_maps(sizes, shape, 7)
    assert shape.num_samples >= num_samples
    assert list(map(tuple, maps.sample_idx.tolist())) == slow_rows(sizes, maps.doc_idx, seq_length)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_rows_equal_megatron_cores_helper(dtype):
    sizes = np.random.RandomState(1).randint(0, 900, 60_000).astype(np.int32)
    shape = shape_of(sizes, range(len(sizes)), 17, 2_000_000)
    doc_idx = shuffled_documents(shape, LegacyGenerator(5))
    helper = getattr(load_megatron_core_helpers(), f"build_sample_idx_{np.dtype(dtype)}")
    expected = helper(sizes, doc_idx, 17, shape.num_epochs, shape.tokens_per_epoch, True, 1)
    rows = np.concatenate([piece.copy() for piece in sample_rows(sizes, doc_idx, shape)])
    assert len(rows) > 1 << 20  # more than one piece
    assert np.array_equal(rows, expected)


@given(
    tokens=st.integers(1, 10**12),
    seq_length=st.integers(1, 8192),
    num_samples=st.integers(0, 10**9),
)
def test_epochs_are_the_fewest_that_suffice(tokens, seq_length, num_samples):
    epochs = epochs_needed(tokens, seq_length, num_samples)
    assert (epochs * tokens - 1) // seq_length >= num_samples
    assert epochs == 1 or ((epochs - 1) * tokens - 1) // seq_length < num_samples


@pytest.mark.parametrize(("num_samples", "dtype"), [(1073741821, np.int32), (1073741823, np.int64)])
def test_sample_idx_widens_before_it_overflows(num_samples, dtype):
    assert PackedShape(range(1), num_samples * 4 + 1, 1, 4).sample_idx_dtype == dtype


@pytest.mark.parametrize(
    ("num_samples", "dtype"), [(4294967293, np.uint32), (4294967294, np.int64)]
)
def test_shuffle_idx_widens_before_it_overflows(num_samples, dtype):
    assert PackedShape(range(1), num_samples * 4 + 1, 1, 4).shuffle_idx_dtype == dtype


def test_a_corpus_without_tokens_has_no_samples():
    with pytest.raises(DatasetError, match="hold no tokens"):
        epochs_needed(0, 4, 1)


def test_a_negative_size_is_named():
    with pytest.raises(DatasetError, match="document 3 has the negative size -7"):
        count_tokens(np.array([1, 2, 3, -7], dtype=np.int32), range(1, 4))


@pytest.mark.parametrize(
    ("doc_idx", "message"),
    [
        ([0, 1, 9], "document 9 at 2 is not one of 3"),
        ([0, -1, 2], "document -1 at 1 is not one of 3"),
        ([0, 1], "the 2 documents have too few tokens"),
    ],
)
def test_a_walk_over_wrong_documents_stops(doc_idx, message):
    sizes = np.array([5, 5, 5], dtype=np.int32)
    shape = PackedShape(range(3), 15, 1, 4)
    with pytest.raises(ValueError, match=message):
        list(sample_rows(sizes, np.array(doc_idx, dtype=np.int32), shape))
