"""Documents that are not cut: NeoX's rows in the head, whole passes in the tail."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron.base.errors import ConfigError, DatasetError
from megatron.stream.streams import SplitCounts, StreamSettings, open_streams
from tests.stream.recorded import DATA, GOLDEN, copy_datasets, write_dataset


@pytest.fixture
def golden(tmp_path):
    copy_datasets(DATA / "golden", tmp_path)
    return StreamSettings(
        seq_length=4,
        seed=1234,
        train_data_paths=(str(tmp_path / "t"),),
        train_label_data_paths=(str(tmp_path / "l"),),
        pack_impl="unpacked",
    )


def open_train(settings, num_samples=5):
    counts = SplitCounts(num_samples, 0, 0)
    return open_streams(settings, counts, is_builder=True, barrier=lambda: None).train


def assert_maps(maps, expected):
    for name in ("doc_idx", "sample_idx", "shuffle_idx"):
        if name in expected:
            assert getattr(maps, name).tolist() == expected[name], name
            assert getattr(maps, name).dtype == np.int64


def test_unpacked_samples_and_labels_equal_neoxs(golden, tmp_path):
    expected = GOLDEN["unpacked_label"]
    stream = open_train(golden)
    assert_maps(stream.orders[0].head, expected)
    assert len(stream) == expected["len"]
    items = expected["items"]
    assert stream.read(np.arange(5)).tolist() == [item["text"] for item in items]
    assert stream.read_labels(np.arange(5)).tolist() == [item["label"] for item in items]
    assert len(list(tmp_path.glob("t_train_0_indexmap_6ns_4sl_1234s_unpackedpi_ac_*.npy"))) == 3


def test_unpacked_without_long_documents_equals_neoxs(golden, tmp_path):
    stream = open_train(dataclasses.replace(golden, allow_chopped=False))
    assert stream.orders[0].head.doc_idx.tolist() == GOLDEN["unpacked_label_nochop"]["doc_idx"]
    assert list(tmp_path.glob("t_train_0_indexmap_6ns_4sl_1234s_unpackedpi_doc_idx.npy"))


def test_packing_until_overflow_equals_neoxs(golden, tmp_path):
    expected = GOLDEN["pack_until_overflow"]
    stream = open_train(
        dataclasses.replace(golden, pack_impl="pack_until_overflow", train_label_data_paths=())
    )
    stem = tmp_path / "t_train_0_indexmap_6ns_4sl_1234s_pack_until_overflowpi_ac"
    for name in ("doc_idx", "sample_idx", "shuffle_idx"):
        saved = np.load(f"{stem}_{name}.npy")
        assert (saved.dtype, saved.tolist()) == (np.int64, expected[name])
    assert len(stream) == expected["len"]
    # The last row has no successor: NeoX reads the first sample in its place.
    assert stream.read(np.arange(5)).tolist() == expected["items"]
    with pytest.raises(ValueError, match="its samples have no labels"):
        stream.read_labels([0])


class Slow:
    """All of an order from lists: sample by sample, as (tokens, labels)."""

    def __init__(self, documents, labels, packing, seq_length, allow_chopped):
        self.texts, self.labels, self.packing = documents, labels, packing
        self.width = seq_length + 1
        shown = seq_length if packing == "unpacked" else self.width
        self.is_kept = [
            (allow_chopped or len(text) <= self.width)
            and (labels is None or any(label != -100 for label in labels[number][:shown]))
            and (labels is not None or packing != "unpacked" or len(text) > 0)
            for number, text in enumerate(documents)
        ]

    def sample(self, row, following):
        both = []
        for texts, padding in ((self.texts, 0), (self.labels, -100)):
            if texts is None:
                both.append(None)
                continue
            row_tokens = [token for number in row for token in texts[number]]
            row_tokens += texts[following][:1]
            padded = row_tokens + [padding] * self.width
            both.append(padded[: self.width])
        return tuple(both)

    def bins(self, documents):
        rows = []
        for number in documents:
            size = len(self.texts[number])
            if rows and sum(len(self.texts[other]) for other in rows[-1]) + size <= self.width:
                rows[-1].append(number)
            else:
                rows.append([number])
        return rows

    def head(self, numbers, num_rows, seed):
        random = np.random.RandomState(seed)
        shuffled = np.arange(num_rows)
        random.shuffle(shuffled)
        if self.packing == "unpacked":
            kept = itertools.cycle([number for number in numbers if self.is_kept[number]])
            drawn = list(itertools.islice(kept, num_rows + 1))
            samples = [self.sample([one], two) for one, two in itertools.pairwise(drawn)]
            return [samples[row] for row in shuffled[:-1]]
        order, documents = np.arange(len(numbers)), []
        while len(rows := self.bins(documents)) < num_rows + 1:
            random.shuffle(order)
            documents += [numbers[i] for i in order if self.is_kept[numbers[i]]]
        samples = [self.sample(row, then[0]) for row, then in itertools.pairwise(rows[:num_rows])]
        return [samples[row if row < num_rows - 1 else shuffled[0]] for row in shuffled[:-1]]

    def block(self, numbers, seed, block):
        state = np.random.SeedSequence([seed, block]).generate_state(1)[0]
        random = np.random.RandomState(state)
        order = list(numbers)
        if self.packing == "unpacked":
            rows = [[number] for number in order if self.is_kept[number]]
        else:
            places = np.arange(len(order))
            random.shuffle(places)
            rows = self.bins([order[i] for i in places if self.is_kept[order[i]]])
        shuffled = np.arange(len(rows))
        random.shuffle(shuffled)
        after = [row[0] for row in rows[1:]] + [rows[0][0]]
        return [self.sample(rows[row], after[row]) for row in shuffled]


_TEXTS = st.lists(st.lists(st.integers(1, 99), max_size=9), min_size=1, max_size=14)


@settings(max_examples=150, deadline=None)
@given(
    texts=_TEXTS,
    has_labels=st.booleans(),
    packing=st.sampled_from(["unpacked", "pack_until_overflow"]),
    allow_chopped=st.booleans(),
    seq_length=st.integers(1, 7),
    seed=st.integers(0, 1000),
    num_samples=st.integers(1, 25),
    data=st.data(),
)
def test_an_order_is_what_lists_give(
    tmp_path_factory, texts, has_labels, packing, allow_chopped, seq_length, seed, num_samples, data
):
    tmp_path = tmp_path_factory.mktemp("rows")
    labels = None
    if has_labels:
        draw = st.sampled_from([-100, -100, 3, 4])
        labels = [data.draw(st.lists(draw, min_size=len(t), max_size=len(t))) for t in texts]
    slow = Slow(texts, labels, packing, seq_length, allow_chopped)
    numbers = range(len(texts))
    stream_settings = StreamSettings(
        seq_length=seq_length,
        seed=seed,
        train_data_paths=(write_dataset(tmp_path / "d", texts),),
        train_label_data_paths=(write_dataset(tmp_path / "l", labels, np.int32),) if labels else (),
        pack_impl=packing,
        allow_chopped=allow_chopped,
    )
    if not any(slow.is_kept):
        with pytest.raises(DatasetError, match=r"documents (can be used|without tokens)"):
            open_train(stream_settings, num_samples)
        return
    assume(any(texts))
    rows = int(np.ceil(num_samples * 1.005))
    # If the last row comes first, NeoX replaces it by itself without end.
    shuffled = np.arange(rows)
    np.random.RandomState(seed).shuffle(shuffled)
    assume(packing == "unpacked" or shuffled[0] != rows - 1)
    expected = slow.head(numbers, rows, seed)
    assert len(expected) == rows - 1
    for block in (1, 2, 3):
        expected += slow.block(numbers, seed, block)
    stream = open_train(stream_settings, num_samples)
    positions = data.draw(st.permutations(range(len(expected))))
    assert stream.read(positions).tolist() == [expected[p][0] for p in positions]
    if labels:
        assert stream.read_labels(positions).tolist() == [expected[p][1] for p in positions]


@pytest.mark.parametrize("packing", ["unpacked", "pack_until_overflow"])
def test_a_split_reads_its_own_documents(tmp_path, packing):
    """NeoX reads the documents at the beginning of the file instead."""
    texts = [[number] * 3 for number in range(1, 41)]
    stream_settings = StreamSettings(
        seq_length=5,
        seed=7,
        data_path=write_dataset(tmp_path / "d", texts),
        split="5,3,2",
        pack_impl=packing,
    )
    counts = SplitCounts(30, 30, 30)
    streams = open_streams(stream_settings, counts, is_builder=True, barrier=lambda: None)
    for stream, numbers in zip(
        (streams.train, streams.valid, streams.test),
        (range(1, 21), range(21, 33), range(33, 41)),
        strict=True,
    ):
        read = stream.read(np.arange(200))
        assert set(np.unique(read).tolist()) - {0} == set(numbers)
        slow = Slow(texts, None, packing, 5, True)
        documents = range(numbers.start - 1, numbers.stop - 1)
        head = slow.head(documents, 30, 7)
        assert read[: len(head)].tolist() == [text for text, _ in head]
    # Other documents under NeoX's name would mislead NeoX; for train they are NeoX's.
    assert len(list(tmp_path.glob("d_train_indexmap_30ns_*_doc_idx.npy"))) == 1
    assert not list(tmp_path.glob("d_valid_indexmap_*"))


def test_maps_of_neox_that_read_other_documents_are_replaced(golden, tmp_path):
    settings_here = dataclasses.replace(golden, train_label_data_paths=())
    stream = open_train(settings_here)
    expected = stream.read(range(9))
    stem = "t_train_0_indexmap_6ns_4sl_1234s_unpackedpi_ac"
    np.save(tmp_path / f"{stem}_doc_idx.npy", stream.orders[0].head.doc_idx[::-1])
    (tmp_path / f"{stem}_checked.json").unlink()
    assert np.array_equal(open_train(settings_here).read(range(9)), expected)


def test_maps_follow_the_labels(golden, tmp_path):
    before = open_train(golden).orders[0].head.doc_idx.tolist()
    labels = [[-100] * 4, [-100, 5, 0], [-100, 0], [-100] * 6, [-100, 13, 0]]
    write_dataset(tmp_path / "l", labels, np.int32)
    after = open_train(golden).orders[0].head.doc_idx.tolist()
    assert (before, after) == ([0, 1, 2, 3, 4, 0, 1], [1, 2, 4, 1, 2, 4, 1])


def test_labels_of_another_dataset_are_refused(golden, tmp_path):
    write_dataset(tmp_path / "l", [[1, 2], [3]], np.int32)
    with pytest.raises(
        DatasetError, match=r"l cannot hold the labels of .*t: its documents \(2 of"
    ):
        open_train(golden)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack_impl": "loose"}, "pack_impl=loose is not known"),
        ({"data_order": "random"}, "data_order=random is not known"),
        (
            {"data_order": "sequential"},
            "data_order: sequential reads rows as they are; leave out pack_impl=unpacked",
        ),
        ({"train_epochs": 1}, "train_epochs needs packed samples, got pack_impl=unpacked"),
        (
            {"train_label_data_paths": ("x", "y")},
            "train_label_data_paths has 2 paths for 1 datasets",
        ),
        (
            {"train_data_paths": (), "data_path": "x"},
            "train_label_data_paths needs train_data_paths, not data_path",
        ),
    ],
)
def test_contradicting_keys_are_refused(golden, changes, message):
    with pytest.raises(ConfigError, match=message):
        open_train(dataclasses.replace(golden, **changes))


@pytest.mark.parametrize(("num_samples", "epochs"), [(19, range(1, 2)), (20, range(1, 3))])
def test_a_heads_epochs_are_the_passes_it_begins(tmp_path, num_samples, epochs):
    path = write_dataset(tmp_path / "d", [[number] * 3 for number in range(1, 21)])
    stream_settings = StreamSettings(
        seq_length=5, seed=7, train_data_paths=(path,), pack_impl="unpacked"
    )
    order = open_train(stream_settings, num_samples).orders[0]
    assert order.epochs(0) == epochs
    assert order.epochs(1) == range(epochs.stop, epochs.stop + 1)
