"""Preshuffled rows: the file is the order, and every row is used."""

import numpy as np
import pytest

from megatron.base.errors import DatasetError
from megatron.stream.streams import SplitCounts, StreamSettings, open_streams
from tests.stream.recorded import write_dataset

EIGHT = SplitCounts(8, 0, 0)


def rows(num_rows, width=5):
    return np.arange(num_rows * width).reshape(num_rows, width)


def settings_of(tmp_path, documents, **changes):
    keys = {
        "seq_length": 4,
        "seed": 3,
        "train_data_paths": (write_dataset(tmp_path / "d", documents),),
        "data_order": "sequential",
        **changes,
    }
    return StreamSettings(**keys)


def open_here(settings, counts=EIGHT):
    return open_streams(settings, counts, is_builder=True, barrier=lambda: None)


def test_rows_come_in_file_order_and_all_of_them(tmp_path):
    stream = open_here(settings_of(tmp_path, rows(20))).train
    assert len(stream) == 20
    assert stream.read(range(20)).tolist() == rows(20).tolist()
    assert not list(tmp_path.glob("*.npy"))


def test_later_passes_shuffle_rows_whole(tmp_path):
    stream = open_here(settings_of(tmp_path, rows(20))).train
    for block in (1, 2, 3):
        state = np.random.SeedSequence([3, block]).generate_state(1)[0]
        shuffled = np.arange(20)
        np.random.RandomState(state).shuffle(shuffled)
        read = stream.read(range(block * 20, block * 20 + 20))
        assert read.tolist() == rows(20)[shuffled].tolist()
    assert [stream.orders[0].epochs(block) for block in (0, 1, 2)] == [
        range(1, 2),
        range(2, 3),
        range(3, 4),
    ]


def test_large_passes_are_kept_in_files(tmp_path, monkeypatch):
    expected = open_here(settings_of(tmp_path, rows(20))).train.read(range(70))
    monkeypatch.setattr("megatron.stream.component_plans._TAIL_BYTES_IN_MEMORY", 0)
    for _ in range(2):
        stream = open_here(settings_of(tmp_path, rows(20))).train
        assert np.array_equal(stream.read(range(70)), expected)
    names = sorted(path.name for path in tmp_path.glob("*.npy"))
    assert names == [
        f"d_tail{block}_0-20docs_4sl_3s_sequentialpi_shuffle_idx.npy" for block in (1, 2, 3)
    ]


def test_a_split_has_its_own_rows(tmp_path):
    prefix = write_dataset(tmp_path / "d", rows(20))
    settings = settings_of(
        tmp_path, rows(20), data_path=prefix, train_data_paths=(), split="10,6,4"
    )
    streams = open_here(settings, SplitCounts(5, 5, 5))
    parts = (streams.train, streams.valid, streams.test)
    assert [len(stream) for stream in parts] == [10, 6, 4]
    read = np.concatenate([stream.read(range(len(stream))) for stream in parts])
    assert read.tolist() == rows(20).tolist()


def test_rows_of_another_length_are_refused(tmp_path):
    documents = [*rows(3).tolist(), [1, 2, 3, 4], [1]]
    with pytest.raises(
        DatasetError,
        match=r"rows of seq_length \+ 1 = 5 tokens, but document 3 has 4 \(2 of 5 have another",
    ):
        open_here(settings_of(tmp_path, documents))


def test_the_number_of_steps_is_no_part_of_the_order(tmp_path):
    settings = settings_of(tmp_path, rows(20))
    short, long = (open_here(settings, SplitCounts(n, 0, 0)).train for n in (3, 300))
    assert short.description == long.description
