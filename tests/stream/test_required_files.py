"""Which files positions need: the same that reading them touches."""

import os
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.stream import required_files as module
from megatron.stream.required_files import first_missing, required_files
from megatron.stream.shard_layout import find_shards
from megatron.stream.streams import SplitCounts, StreamSettings, open_streams
from tests.stream.recorded import write_dataset
from tests.stream.test_token_bytes import cut

SEQ_LENGTH = 6


def write_corpora(folder):
    """Write two datasets and labels of another type for each, all in shards of awkward sizes."""
    random = np.random.default_rng(5)
    for name, count, shard_bytes in (("a", 30, 61), ("b", 12, 37)):
        sizes = random.integers(0, 20, count)
        for kind, dtype, cut_at in (("", np.uint16, shard_bytes), ("l", np.int32, 101)):
            documents = [random.integers(0, 99, size).astype(dtype) for size in sizes]
            prefix = write_dataset(folder / f"{kind}{name}", documents, dtype)
            cut(prefix, range(cut_at, os.path.getsize(f"{prefix}.bin"), cut_at))


def stream_of(folder, kind):
    paths = {"blend": ["a", "b"]}.get(kind, ["a"])
    changes = {}
    if kind in ("labels", "unpacked"):
        changes["train_label_data_paths"] = tuple(str(folder / f"l{path}") for path in paths)
    if kind == "unpacked":
        changes["pack_impl"] = "unpacked"
    if kind == "blend":
        changes["train_data_weights"] = (3.0, 1.0)
    wanted = StreamSettings(
        seq_length=SEQ_LENGTH,
        seed=7,
        train_data_paths=tuple(str(folder / path) for path in paths),
        **changes,
    )
    counts = SplitCounts(60, 0, 0)
    return open_streams(wanted, counts, is_builder=True, barrier=lambda: None).train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("required")
    write_corpora(folder)
    return folder


def brute_force(stream, positions):
    """Return the bytes of each file, and its positions, one token after another."""
    read, where = defaultdict(set), defaultdict(list)
    for position in positions:
        spans = stream.spans([position])
        for document, start, length, component in zip(
            spans.document, spans.start, spans.length, spans.component, strict=True
        ):
            order = stream.orders[component]
            for dataset in filter(None, (order.dataset, order.labels)):
                size = dataset.dtype.itemsize
                begin = int(dataset.pointers[document]) + int(start) * size
                for byte in range(begin, begin + int(length) * size):
                    shard = next(s for s in dataset.tokens.shards if s.start <= byte < s.stop)
                    read[shard.path].add(byte - shard.start)
                    where[shard.path].append(position)
    return read, where


@pytest.mark.parametrize("kind", ["one", "blend", "labels", "unpacked"])
@settings(max_examples=12)
@given(start=st.integers(0, 90), length=st.integers(1, 60), chunk=st.integers(1, 70))
def test_files_bytes_and_positions_are_those_that_are_read(folder, kind, start, length, chunk):
    stream = stream_of(folder, kind)
    positions = range(start, start + length)
    read, where = brute_force(stream, positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        found = required_files(stream, positions, with_ranges=True)
    assert {use.shard.path for use in found} == set(read)
    for use in found:
        path = use.shard.path
        ranges = [byte for first, stop in use.ranges for byte in range(first, stop)]
        assert ranges == sorted(read[path])
        assert (use.start, use.stop) == (min(ranges), max(ranges) + 1)
        assert use.num_bytes == len(where[path])
        assert use.num_samples == len(set(where[path]))
        assert (use.first_position, use.last_position) == (min(where[path]), max(where[path]))


@pytest.mark.parametrize("kind", ["one", "blend", "labels", "unpacked"])
@settings(max_examples=12, deadline=None)
@given(data=st.data(), start=st.integers(0, 70), length=st.integers(1, 60))
def test_missing_files_are_met_where_they_are_read_first(folder, kind, data, start, length):
    stream = stream_of(folder, kind)
    positions = range(start, start + length)
    _, where = brute_force(stream, positions)
    datasets = {d.prefix for o in stream.orders for d in (o.dataset, o.labels) if d is not None}
    paths = [path for prefix in sorted(datasets) for path in find_shards(prefix)]
    missing = data.draw(st.sets(st.sampled_from(paths), min_size=1, max_size=4))
    walked = data.draw(st.sampled_from([0, 7, 1000]))
    expected = sorted((min(where[path]), path) for path in missing if path in where)
    for path in missing:
        path.rename(f"{path}.away")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_WALKED", walked)
            found = first_missing(
                stream_of(folder, kind) if kind != "unpacked" else _seen_again(stream), positions
            )
    finally:
        for path in missing:
            os.rename(f"{path}.away", path)
    assert [(need.position, need.path) for need in found] == expected


def _seen_again(stream):
    """Look again which files are there; labels decide which documents unpacked data keeps."""
    for order in stream.orders:
        order.dataset.__setstate__(order.dataset.prefix)
        order.labels.__setstate__(order.labels.prefix)
    return stream


@settings(max_examples=30, deadline=None)
@given(data=st.data(), start=st.integers(0, 60), length=st.integers(1, 120))
def test_rows_in_order_of_the_file_need_no_search(tmp_path_factory, data, start, length):
    """Also past the head of 50 rows, where they are shuffled."""
    folder = tmp_path_factory.mktemp("rows")
    rows = np.arange(50 * (SEQ_LENGTH + 1), dtype=np.uint16).reshape(50, -1)
    prefix = write_dataset(folder / "rows", list(rows))
    cut(prefix, range(61, 700, 61))
    keys = {"seq_length": SEQ_LENGTH, "seed": 7, "data_order": "sequential"}
    wanted = StreamSettings(train_data_paths=(prefix,), **keys)
    stream = open_streams(
        wanted, SplitCounts(50, 0, 0), is_builder=True, barrier=lambda: None
    ).train
    positions = range(start, start + length)
    _, where = brute_force(stream, positions)
    missing = data.draw(st.sets(st.sampled_from(find_shards(prefix)), min_size=1, max_size=4))
    expected = sorted((min(where[path]), path) for path in missing if path in where)
    for path in missing:
        path.unlink()
    stream.orders[0].dataset.__setstate__(prefix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WALKED", 3)
        found = first_missing(stream, positions)
    assert [(need.position, need.path) for need in found] == expected
