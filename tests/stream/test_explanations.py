"""A sample is the bytes it is said to be, and documents and bytes are found where they are read."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.stream.descriptions import describe_streams, open_order_alone
from megatron.stream.scans import indices_between, indices_of, ranks, rows_containing
from megatron.stream.stream_settings import identify_datasets
from megatron.stream.streams import SplitCounts, StreamSettings
from tests.stream.recorded import write_dataset


def cut(prefix, borders):
    """Replace the token file by shards that end at ``borders``; some may be empty."""
    content = Path(f"{prefix}.bin").read_bytes()
    os.unlink(f"{prefix}.bin")
    ends = [*sorted(min(border, len(content)) for border in borders), len(content)]
    for index, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        shard = Path(f"{prefix}-{index:05d}-of-{len(ends) - 1:05d}.bin")
        shard.write_bytes(content[start:end])


@st.composite
def streams(draw, folder):
    """A stream of one or two sharded datasets, packed in any way, and its datasets' tokens."""
    packing = draw(st.sampled_from(["packed", "packed", "unpacked", "pack_until_overflow"]))
    paths = []
    for number in range(draw(st.integers(1, 2))):
        sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
        tokens = 10_000 * number + np.arange(sum(sizes))
        documents = np.split(tokens, np.cumsum(sizes)[:-1])
        path = write_dataset(folder / f"d{number}", documents, np.int32)
        cut(path, draw(st.lists(st.integers(0, 4 * sum(sizes)), max_size=3)))
        paths.append(path)
    stream_settings = StreamSettings(
        seq_length=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 99)),
        train_data_paths=tuple(paths),
        train_data_weights=(1.0, 0.4)[: len(paths)],
        pack_impl=packing,
    )
    identities = identify_datasets(stream_settings)
    counts = SplitCounts(draw(st.integers(2, 30)), 0, 0)
    order = describe_streams(stream_settings, counts, identities)["train"]
    located = {one.digest: files for files, one in identities.items()}
    return open_order_alone(order, located.__getitem__)


def bytes_of(part):
    return b"".join(Path(one.path).read_bytes()[one.start : one.stop] for one in part.bytes)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_sample_is_the_bytes_that_explain_it(tmp_path_factory, data):
    stream = data.draw(streams(tmp_path_factory.mktemp("explained")))
    positions = data.draw(st.lists(st.integers(0, 90), max_size=12))
    read = stream.read(positions)
    explained = stream.explain(positions)
    assert len(explained) == len(positions)
    refs = stream.locate(positions)
    for index, (position, sample) in enumerate(zip(positions, explained, strict=True)):
        order = stream.orders[sample.component]
        tokens = np.frombuffer(b"".join(map(bytes_of, sample.documents)), "<i4").tolist()
        assert tokens + [0] * sample.padding == read[index].tolist()
        assert sample.position == position
        assert (sample.component, sample.block, sample.sample) == (
            refs.dataset[index],
            refs.block[index],
            refs.sample[index],
        )
        assert sample.key == stream.description.components[sample.component].key
        assert sample.prefix == order.dataset.prefix
        assert sample.epochs == order.epochs(sample.block)
        for part in sample.documents:
            document = order.dataset[part.document]
            assert np.frombuffer(bytes_of(part), "<i4").tolist() == (
                document[part.start : part.stop].tolist()
            )
            assert all(one.start < one.stop for one in part.bytes)


def uses(stream, positions):
    """Every document read at positions, from what explains them: slow and obvious."""
    for sample in stream.explain(positions):
        for part in sample.documents:
            yield sample, part


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_documents_are_found_where_they_are_read(tmp_path_factory, data):
    stream = data.draw(streams(tmp_path_factory.mktemp("found")))
    start = data.draw(st.integers(0, 60))
    positions = range(start, start + data.draw(st.integers(0, 60)))
    component = data.draw(st.sampled_from(range(len(stream.orders))))
    document = data.draw(st.sampled_from(range(len(stream.orders[component].dataset))))
    found = stream.positions_of_document(component, document, positions)
    expected = [
        (sample.position, sample.block, sample.sample, part.start, part.stop)
        for sample, part in uses(stream, positions)
        if sample.component == component and part.document == document
    ]
    columns = (found.position, found.block, found.sample, found.start, found.start + found.length)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    for block, epoch in zip(found.block.tolist(), found.epoch.tolist(), strict=True):
        assert epoch in stream.orders[component].epochs(block)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_bytes_are_found_where_they_are_read(tmp_path_factory, data):
    stream = data.draw(streams(tmp_path_factory.mktemp("bytes")))
    positions = range(data.draw(st.integers(0, 40)), 70)
    component = data.draw(st.sampled_from(range(len(stream.orders))))
    dataset = stream.orders[component].dataset
    start = data.draw(st.integers(0, dataset.tokens.size - 1))
    stop = data.draw(st.integers(start + 1, dataset.tokens.size))
    found = stream.positions_of_bytes(component, start, stop, positions)
    expected = []
    for sample, part in uses(stream, positions):
        if sample.component != component:
            continue
        first = int(dataset.pointers[part.document])
        tokens = [
            token
            for token in range(part.start, part.stop)
            if first + 4 * token < stop and first + 4 * token + 4 > start
        ]
        if tokens:
            expected.append((sample.position, part.document, tokens[0], len(tokens)))
    columns = (found.position, found.document, found.start, found.length)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_epochs_count_the_readings_of_a_document(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("epochs")
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
    documents = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    path = write_dataset(folder / "d", documents)
    stream_settings = StreamSettings(seq_length=3, seed=1, data_path=path, split="1")
    identities = identify_datasets(stream_settings)
    counts = SplitCounts(data.draw(st.integers(1, 40)), 0, 0)
    order_description = describe_streams(stream_settings, counts, identities)["train"]
    stream = open_order_alone(order_description, lambda digest: path)
    order = stream.orders[0]

    def tokens_of(block):
        """The row of tokens that a block's samples are cut from, with the epoch of each."""
        seen = [0] * len(sizes)
        for document in order.block(block).doc_idx.tolist():
            epoch = order.epochs(block).start + seen[document]
            seen[document] += 1
            for token in range(sizes[document]):
                yield document, token, epoch

    positions = range(stream.head_length + order.block(1).num_samples + 3)
    expected = set()
    refs = stream.locate(positions)
    rows = [list(tokens_of(block)) for block in range(refs.block.max() + 1)]
    for position, block, row in zip(
        positions, refs.block.tolist(), refs.sample.tolist(), strict=True
    ):
        for document, token, epoch in rows[block][3 * row : 3 * row + 4]:
            expected.add((position, document, token, epoch))
    found = set()
    for document in range(len(sizes)):
        uses_of_it = stream.positions_of_document(0, document, positions)
        for position, epoch, first, length in zip(
            uses_of_it.position.tolist(),
            uses_of_it.epoch.tolist(),
            uses_of_it.start.tolist(),
            uses_of_it.length.tolist(),
            strict=True,
        ):
            found |= {(position, document, token, epoch) for token in range(first, first + length)}
    assert found == expected


def test_sequential_rows_are_found(tmp_path):
    rows = np.arange(60).reshape(12, 5)
    path = write_dataset(tmp_path / "d", rows)
    stream_settings = StreamSettings(
        seq_length=4, seed=1, data_path=path, split="1", data_order="sequential"
    )
    identities = identify_datasets(stream_settings)
    order = describe_streams(stream_settings, SplitCounts(5, 0, 0), identities)["train"]
    stream = open_order_alone(order, lambda digest: path)
    found = stream.positions_of_document(0, 7, range(3, 60))
    read = stream.read(range(3, 60))
    expected = 3 + np.flatnonzero((read == rows[7]).all(axis=1))
    assert found.position.tolist() == expected.tolist()
    assert found.epoch.tolist() == [1, 2, 3, 4, 5]
    assert stream.positions_of_document(0, 7, range(8, 12)).position.tolist() == []
    (sample,) = stream.explain([7])
    assert [(part.document, part.start, part.stop) for part in sample.documents] == [(7, 0, 5)]


def test_nothing_is_explained_by_nothing(tmp_path):
    path = write_dataset(tmp_path / "d", [[1, 2, 3]])
    stream_settings = StreamSettings(seq_length=1, seed=1, data_path=path, split="1")
    identities = identify_datasets(stream_settings)
    order = describe_streams(stream_settings, SplitCounts(5, 0, 0), identities)["train"]
    stream = open_order_alone(order, lambda digest: path)
    assert stream.explain([]) == []
    assert len(stream.spans([])) == 0
    with pytest.raises(ValueError, match="positions must be >= 0, got -1"):
        stream.explain([-1])


@given(values=st.lists(st.integers(0, 9), max_size=30), data=st.data())
def test_scans_find_what_a_loop_finds(values, data):
    array = np.array(values, dtype=np.uint32)
    first = data.draw(st.integers(0, 9))
    stop = data.draw(st.integers(first, 10))
    found = indices_between(array, first, stop)
    assert found.tolist() == [i for i, value in enumerate(values) if first <= value < stop]
    wanted = sorted(data.draw(st.sets(st.integers(0, 9), min_size=1)))
    start = data.draw(st.integers(0, len(values)))
    found = indices_of(array, np.array(wanted), range(start, len(values)), 10)
    assert found.tolist() == [i for i, value in enumerate(values) if value in wanted and i >= start]
    assert ranks(array).tolist() == [values[:i].count(value) for i, value in enumerate(values)]


def test_scans_go_over_the_borders_of_pieces(monkeypatch):
    monkeypatch.setattr("megatron.stream.scans._PIECE", 7)
    values = np.random.RandomState(0).randint(0, 50, 200)
    expected = np.flatnonzero((values >= 10) & (values < 20))
    assert np.array_equal(indices_between(values, 10, 20), expected)
    for wanted in ([3], [3, 4, 5, 20], [1, 3, 5, 7, 9, 11]):
        expected = [i for i in range(30, 190) if values[i] in wanted]
        assert indices_of(values, np.array(wanted), range(30, 190), 50).tolist() == expected


@given(
    steps=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    places=st.sets(st.integers(0, 40), min_size=1),
)
def test_rows_are_found_by_the_documents_they_touch(steps, places):
    begins = np.cumsum([0, *steps])
    sample_idx = np.stack([begins, np.zeros_like(begins)], axis=1).astype(np.int32)
    expected = [
        row
        for row in range(len(steps))
        if any(begins[row] <= place <= begins[row + 1] for place in places)
    ]
    assert rows_containing(sample_idx, np.array(sorted(places))).tolist() == expected
