"""The compiled shuffle is NumPy's, and leaves the generator where NumPy's would be."""

import importlib
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.stream import compiled
from megatron.stream.legacy_random import LegacyGenerator

_DTYPES = (np.int32, np.uint32, np.int64)


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=5),
    dtype=st.sampled_from(_DTYPES),
)
def test_shuffles_one_after_the_other_equal_numpys(seed, sizes, dtype):
    ours, theirs = LegacyGenerator(seed), np.random.RandomState(seed)
    for size in sizes:
        expected = np.arange(size, dtype=dtype)
        actual = expected.copy()
        theirs.shuffle(expected)
        ours.shuffle(actual)
        assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("size", [63, 64, 65, 127, 128, 129, 65535, 65536, 65537, 300_001])
def test_sizes_around_block_and_mask_borders_equal_numpys(size, dtype):
    expected = np.arange(size, dtype=dtype)
    actual = expected.copy()
    np.random.RandomState(size).shuffle(expected)
    LegacyGenerator(size).shuffle(actual)
    assert np.array_equal(actual, expected)


@given(
    seed=st.integers(0, 2**32 - 1),
    limits=st.lists(st.integers(2**32, 2**63 - 2), min_size=1, max_size=20),
)
def test_targets_among_more_than_four_billion_items_equal_numpys(seed, limits):
    # An array that large doesn't fit here; NumPy's randint draws by the same rule as its shuffle.
    theirs = np.random.RandomState(seed)
    _, key, position, *_ = np.random.RandomState(seed).get_state()
    for limit in limits:
        target, position = compiled.draw_wide(limit, key, position)
        assert target == theirs.randint(0, limit + 1, dtype=np.int64)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4), np.int32), np.zeros(8, np.int32)[::2]],
    ids=["two dimensions", "strided"],
)
def test_arrays_it_cannot_shuffle_are_refused(array):
    with pytest.raises(ValueError, match="only contiguous one-dimensional arrays"):
        LegacyGenerator(1).shuffle(array)


def test_items_of_other_widths_are_refused():
    with pytest.raises(TypeError, match="4- or 8-byte items"):
        LegacyGenerator(1).shuffle(np.zeros(8, np.uint16))


def test_without_the_extension_the_error_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.stream._shuffle", None)
    with pytest.raises(ImportError, match="not built for this Python: run `make setup`"):
        importlib.reload(compiled)
