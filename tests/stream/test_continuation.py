"""When a blend changes, every dataset goes on from where it is."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.base.errors import DatasetError
from megatron.stream.blending import DRAWS_PER_CHUNK, Blend
from megatron.stream.descriptions import blended_continuation, describe_streams, open_order_alone
from megatron.stream.stream_settings import identify_datasets
from megatron.stream.streams import SplitCounts, StreamSettings
from tests.stream.recorded import write_dataset

NAMES = "abcd"
REQUESTED = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four datasets whose tokens tell which one they are of."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.RandomState(5)
    for number, name in enumerate(NAMES):
        documents = [
            random.randint(1000 * number, 1000 * number + 999, random.randint(0, 12))
            for _ in range(20)
        ]
        write_dataset(folder / name, documents)
    return folder


def wanted_order(corpus, weights):
    """The order of a new run with datasets of these weights."""
    stream_settings = StreamSettings(
        seq_length=5,
        seed=11,
        train_data_paths=tuple(str(corpus / name) for name in weights),
        train_data_weights=tuple(weights.values()),
    )
    identities = identify_datasets(stream_settings)
    order = describe_streams(stream_settings, SplitCounts(REQUESTED, 0, 0), identities)["train"]
    located = {one.digest: files for files, one in identities.items()}
    return order, located


def alone(corpus, component, order, located):
    """All samples of one component from its beginning, whatever is drawn of it."""
    component = dataclasses.replace(component, start=0, occurrence=0)
    single = dataclasses.replace(order, components=(component,), weights=None)
    return open_order_alone(single, located.__getitem__).read(range(400)).tolist()


def greedy(weights, num_draws):
    weights = np.array(weights) / np.sum(weights)
    counts = [0] * len(weights)
    for n in range(num_draws):
        errors = [w * max(n, 1.0) - count for w, count in zip(weights, counts, strict=True)]
        chosen = errors.index(max(errors))
        counts[chosen] += 1
        yield chosen


_BLENDS = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([1.0, 2.0, 0.3, 5.0]), min_size=1)


@settings(max_examples=40, deadline=None)
@given(
    phases=st.lists(st.tuples(_BLENDS, st.integers(0, 60)), min_size=1, max_size=5),
    added_begin_with=st.sampled_from(["head", "tail"]),
)
def test_a_history_of_blends_draws_every_dataset_in_a_row(corpus, phases, added_begin_with):
    samples, drawn, cursors, earlier = {}, {}, {}, []
    for weights, num_samples in phases:
        wanted, located = wanted_order(corpus, weights)
        order = wanted
        if earlier:
            order = blended_continuation(
                wanted, earlier, cursors, added_begin_with=added_begin_with
            )
        for name, component in zip(weights, wanted.components, strict=True):
            if name not in samples:
                if earlier and added_begin_with == "tail":
                    component = dataclasses.replace(component, head_epochs=None)
                samples[name] = alone(corpus, component, wanted, located)
                drawn[name] = 0
        expected = []
        for index in greedy(list(weights.values()), num_samples):
            name = list(weights)[index]
            expected.append(samples[name][drawn[name]])
            drawn[name] += 1
        stream = open_order_alone(order, located.__getitem__)
        assert stream.read(range(num_samples)).tolist() == expected
        now = stream.component_cursors(num_samples)
        assert list(now.values()) == [drawn[name] for name in weights]
        assert list(stream.component_cursors(0).values()) == [
            component.start for component in order.components
        ]
        cursors.update(now)
        earlier.append(order)


def test_a_removed_dataset_returns_where_it_was(corpus):
    first, located = wanted_order(corpus, {"a": 1.0, "b": 1.0})
    stream = open_order_alone(first, located.__getitem__)
    cursors = stream.component_cursors(21)
    only_a = blended_continuation(wanted_order(corpus, {"a": 1.0})[0], [first], cursors)
    assert [one.start for one in only_a.components] == [11]
    cursors |= open_order_alone(only_a, located.__getitem__).component_cursors(7)
    again = blended_continuation(first, [first, only_a], cursors)
    assert [one.start for one in again.components] == [18, 10]
    assert [one.head_epochs for one in again.components] == [
        one.head_epochs for one in first.components
    ]


def test_an_added_dataset_begins_with_its_first_tail_block(corpus):
    first, _ = wanted_order(corpus, {"a": 1.0})
    both, located = wanted_order(corpus, {"a": 1.0, "b": 1.0})
    order = blended_continuation(both, [first], {first.components[0].key: 5})
    assert [one.head_epochs for one in order.components][1] is None
    stream = open_order_alone(order, located.__getitem__)
    refs = stream.locate([1])
    assert (refs.dataset.tolist(), refs.block.tolist()) == ([1], [1])
    assert stream.orders[1].epochs(1) == range(1, 2)


def test_a_cursor_of_nothing_is_an_error(corpus):
    order, _ = wanted_order(corpus, {"a": 1.0})
    with pytest.raises(DatasetError, match=r"a cursor of .*#0, but no earlier order draws"):
        blended_continuation(order, [], {order.components[0].key: 3})


def test_one_dataset_alone_counts_too(corpus):
    stream_settings = StreamSettings(seq_length=5, seed=11, data_path=str(corpus / "a"), split="1")
    identities = identify_datasets(stream_settings)
    order = describe_streams(stream_settings, SplitCounts(9, 0, 0), identities)["train"]
    stream = open_order_alone(order, lambda digest: str(corpus / "a"))
    assert stream.component_cursors(33) == {order.components[0].key: 33}
    begun = dataclasses.replace(
        order, components=(dataclasses.replace(order.components[0], start=4),)
    )
    later = open_order_alone(begun, lambda digest: str(corpus / "a"))
    assert np.array_equal(later.read(range(50)), stream.read(range(4, 54)))
    assert later.component_cursors(33) == {order.components[0].key: 37}


@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 9.0), min_size=1, max_size=5),
    start=st.integers(0, 3 * DRAWS_PER_CHUNK),
    data=st.data(),
)
def test_draws_are_found_backwards(weights, start, data):
    positions = np.arange(start, start + 3000)
    blend = Blend(weights)
    datasets, samples = blend.locate(positions)
    for dataset in range(len(weights)):
        own = np.flatnonzero(datasets == dataset)
        before, after = blend.counts(start)[dataset], blend.counts(start + 3000)[dataset]
        assert samples[own].tolist() == list(range(before, after))
        found = Blend(weights).positions(dataset, samples[own], start + 3000)
        assert found.tolist() == positions[own].tolist()
    assert sum(blend.counts(start)) == start


def test_draws_beyond_the_stop_are_an_error():
    with pytest.raises(ValueError, match="dataset 1 gives 3 samples before position 10, not 4"):
        Blend([0.7, 0.3]).positions(1, np.array([1, 3]), 10)
