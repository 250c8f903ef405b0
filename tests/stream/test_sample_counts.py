"""Splits and sample counts are NeoX's formulas."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import ConfigError
from megatron.stream.sample_counts import (
    SplitCounts,
    requested_samples,
    samples_per_dataset,
    split_documents,
    train_iters_for_epochs,
)
from tests.stream.recorded import GOLDEN


@pytest.mark.parametrize(("case", "ends"), GOLDEN["splits"].items())
def test_splits_equal_neoxs(case, ends):
    split, num_documents = case.split("|")
    ranges = split_documents(split, int(num_documents))
    assert [ranges[0].start, *(part.stop for part in ranges)] == ends


@given(
    shares=st.lists(st.floats(0, 1e6), min_size=1, max_size=3).filter(lambda s: sum(s) > 1e-3),
    num_documents=st.integers(1, 10**9),
)
def test_splits_cover_all_documents_once(shares, num_documents):
    train, valid, test = split_documents(",".join(map(str, shares)), num_documents)
    assert train.start == 0
    assert (train.stop, valid.stop, test.stop) == (valid.start, test.start, num_documents)


def test_a_share_that_rounding_pushes_below_zero_is_empty():
    # NeoX's train would end at -1 and its validation begin at the file's last document.
    assert split_documents("0,1,1", 3) == (range(0), range(1), range(1, 3))


@pytest.mark.parametrize("split", ["a,b", "", "0,0,0", "5,-1,2", "nan,1"])
def test_a_split_that_says_nothing_is_refused(split):
    with pytest.raises(ConfigError, match="split="):
        split_documents(split, 10)


def test_requested_samples_of_pythia():
    requested = requested_samples(
        train_iters=143000, train_batch_size=1024, eval_interval=40000, eval_iters=10
    )
    assert requested == SplitCounts(train=146432000, valid=4 * 10240, test=10240)


def test_epochs_ask_for_one_epoch_of_every_split():
    requested = requested_samples(
        train_iters=None, train_batch_size=8, eval_interval=10, eval_iters=2
    )
    assert requested == SplitCounts(None, None, None)


@pytest.mark.parametrize(("case", "expected"), GOLDEN["norm_weights"].items())
def test_samples_per_dataset_equal_neoxs(case, expected):
    weights, num_samples = case.split("|")
    assert samples_per_dataset(int(num_samples), expected[0]) == expected[1]
    assert len(expected[0]) == weights.count(",") + 1


def test_pythias_request_is_rounded_up_from_just_below():
    assert samples_per_dataset(146432000, [1.0]) == [147164160]


@given(
    epochs=st.integers(1, 9),
    samples=st.lists(st.integers(1, 1000), min_size=1, max_size=4),
    batch=st.integers(1, 64),
)
def test_epochs_take_the_steps_that_their_samples_fill(epochs, samples, batch):
    steps = train_iters_for_epochs(epochs, samples, batch)
    available = sum(samples) * epochs - len(samples)
    assert steps == math.floor(available / batch)
    all_of_them = train_iters_for_epochs(epochs, samples, batch, packing="sequential")
    assert all_of_them == sum(samples) * epochs // batch
