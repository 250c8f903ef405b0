"""Blends draw as NeoX does, and any position is found without drawing from the start."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.base.errors import ConfigError
from megatron.stream.blending import (
    DRAWS_PER_CHUNK,
    Blend,
    normalised,
    weights_by_num_documents,
)
from tests.stream.recorded import GOLDEN, load_megatron_core_helpers

_WEIGHTS = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=12)


def greedy(weights, num_draws):
    """The rule as a slow loop over Python floats."""
    counts = [0] * len(weights)
    drawn = []
    for n in range(num_draws):
        errors = [
            weight * max(n, 1.0) - count for weight, count in zip(weights, counts, strict=True)
        ]
        chosen = errors.index(max(errors))
        drawn.append((chosen, counts[chosen]))
        counts[chosen] += 1
    return drawn


@pytest.mark.parametrize(("weights", "expected"), GOLDEN["blend"].items())
def test_draws_equal_neoxs(weights, expected):
    datasets, samples = Blend(eval(weights)).locate(np.arange(16))
    assert [datasets.tolist(), samples.tolist()] == expected


@given(weights=_WEIGHTS)
def test_draws_equal_the_rule(weights):
    blend = Blend(weights)
    datasets, samples = blend.locate(np.arange(300))
    drawn = zip(datasets.tolist(), samples.tolist(), strict=True)
    assert list(drawn) == greedy(blend.weights.tolist(), 300)


@pytest.mark.parametrize("num_datasets", [2, 10, 255])
def test_draws_equal_megatron_cores_helper(num_datasets):
    size = 2 * DRAWS_PER_CHUNK + 17
    weights = np.random.RandomState(num_datasets).rand(num_datasets)
    blend = Blend(weights)
    datasets, samples = blend.locate(np.arange(size))
    # The helper silently writes nothing unless the dataset index is int16.
    expected = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    load_megatron_core_helpers().build_blending_indices(
        *expected, blend.weights, num_datasets, size, False
    )
    assert np.array_equal(datasets, expected[0])
    assert np.array_equal(samples, expected[1])


@settings(max_examples=20)
@given(weights=_WEIGHTS, positions=st.lists(st.integers(0, 5 * DRAWS_PER_CHUNK), max_size=50))
def test_a_jump_finds_what_a_walk_finds(weights, positions):
    walked_datasets, walked_samples = Blend(weights).locate(np.arange(5 * DRAWS_PER_CHUNK + 1))
    datasets, samples = Blend(weights).locate(np.array(positions, dtype=np.int64))
    assert np.array_equal(datasets, walked_datasets[positions])
    assert np.array_equal(samples, walked_samples[positions])


@given(weights=_WEIGHTS)
def test_every_dataset_gives_its_samples_in_a_row(weights):
    datasets, samples = Blend(weights).locate(np.arange(1000))
    for number in range(len(weights)):
        own = samples[datasets == number]
        assert own.tolist() == list(range(len(own)))


@pytest.mark.parametrize(("case", "expected"), GOLDEN["weights_by_num_docs"].items())
def test_weights_by_num_documents_equal_neoxs(case, expected):
    assert weights_by_num_documents(*eval(case)) == expected


@pytest.mark.parametrize(("case", "expected"), GOLDEN["norm_weights"].items())
def test_normalised_weights_equal_neoxs(case, expected):
    assert normalised(eval(case.split("|")[0])) == expected[0]


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -0.5], [float("nan")]])
def test_weights_without_a_meaning_are_refused(weights):
    with pytest.raises(ConfigError, match="must be at least 0 and not all 0"):
        normalised(weights)


def test_kept_counts_are_used_and_never_needed(tmp_path):
    path = tmp_path / "blend.counts"
    positions = np.array([4 * DRAWS_PER_CHUNK + 5, 7])
    expected = Blend([0.7, 0.3]).locate(positions)
    Blend([0.7, 0.3]).save_counts(path, 5 * DRAWS_PER_CHUNK)
    blend = Blend([0.7, 0.3])
    blend.load_counts(path)
    assert len(blend._counts) == 5
    assert np.array_equal(blend.locate(positions), expected)


@pytest.mark.parametrize("damage", [lambda content: content[:-8], lambda content: b"x" + content])
def test_damaged_counts_are_not_used(tmp_path, damage):
    path = tmp_path / "blend.counts"
    Blend([0.7, 0.3]).save_counts(path, 5 * DRAWS_PER_CHUNK)
    path.write_bytes(damage(path.read_bytes()))
    blend = Blend([0.7, 0.3])
    blend.load_counts(path)
    assert len(blend._counts) == 1


def test_a_file_with_fewer_counts_is_extended(tmp_path):
    path = tmp_path / "blend.counts"
    Blend([0.7, 0.3]).save_counts(path, 2 * DRAWS_PER_CHUNK)
    Blend([0.7, 0.3]).save_counts(path, 4 * DRAWS_PER_CHUNK)
    Blend([0.7, 0.3]).save_counts(path, 1)
    blend = Blend([0.7, 0.3])
    blend.load_counts(path)
    assert len(blend._counts) == 4
