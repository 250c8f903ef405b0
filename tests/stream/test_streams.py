"""What the configuration names becomes three endless streams, or a clear refusal."""

import dataclasses
import threading

import numpy as np
import pytest

from megatron.base.errors import ConfigError, DatasetError
from megatron.stream.sample_counts import requested_samples, train_iters_for_epochs
from megatron.stream.streams import SplitCounts, StreamSettings, open_streams
from tests.stream.recorded import DATA, copy_datasets, write_dataset
from tests.worlds import run_ranks

ALL = SplitCounts(train=100, valid=20, test=10)


@pytest.fixture
def folder(tmp_path):
    copy_datasets(DATA / "oracle", tmp_path)
    return tmp_path


def single(folder, **changes):
    settings = StreamSettings(
        seq_length=64, seed=1234, data_path=str(folder / "corpus_a_text_document")
    )
    return dataclasses.replace(settings, **changes)


def blended(folder, names="ab", weights=None, **changes):
    settings = StreamSettings(
        seq_length=64,
        seed=1234,
        train_data_paths=tuple(str(folder / f"corpus_{name}_text_document") for name in names),
        train_data_weights=weights,
        valid_data_paths=(str(folder / "corpus_c_text_document"),),
        test_data_paths=(str(folder / "corpus_c_text_document"),),
    )
    return dataclasses.replace(settings, **changes)


def open_here(settings, requested=ALL):
    return open_streams(settings, requested, is_builder=True, barrier=lambda: None)


def test_a_stream_goes_on_past_its_head(folder):
    stream = open_here(single(folder)).train
    length = len(stream)
    tokens = stream.read(np.arange(length - 3, length + 3))
    assert tokens.shape == (6, 65)
    refs = stream.locate(np.arange(length - 3, length + 3))
    assert refs.block.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("make", [single, blended])
def test_no_positions_give_no_rows(folder, make):
    assert open_here(make(folder)).train.read([]).shape == (0, 65)


@pytest.mark.parametrize("make", [single, blended])
def test_a_negative_position_is_refused(folder, make):
    with pytest.raises(ValueError, match=r"positions must be >= 0, got -1"):
        open_here(make(folder)).train.read([4, -1])


@pytest.mark.parametrize("make", [single, blended])
def test_rows_do_not_depend_on_what_is_read_with_them(folder, make):
    stream = open_here(make(folder)).train
    positions = np.random.RandomState(0).randint(0, 3 * len(stream), 60)
    together = stream.read(positions)
    for position, row in zip(positions, together, strict=True):
        assert np.array_equal(stream.read([position])[0], row)


def test_threads_read_what_one_reads(folder):
    settings = blended(folder, weights=(0.7, 0.3))
    expected = open_here(settings).train.read(np.arange(6000))
    stream = open_here(settings).train
    parts = [None] * 6
    barrier = threading.Barrier(6)

    def work(index):
        barrier.wait()
        parts[index] = stream.read(np.arange(index * 1000, (index + 1) * 1000))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(np.concatenate(parts), expected)


def test_a_blend_past_a_datasets_end_takes_that_datasets_tail(folder):
    stream = open_here(blended(folder, names="ac", weights=(0.1, 0.9))).train
    positions = np.arange(2000)
    refs = stream.locate(positions)
    for number, order in enumerate(stream.orders):
        own = refs.dataset == number
        block, sample = order.locate(np.arange(own.sum()))
        assert refs.block[own].tolist() == block.tolist()
        assert refs.sample[own].tolist() == sample.tolist()
    assert refs.block.max() > 5


def test_empty_splits_and_splits_nobody_asks_for_are_none(folder):
    streams = open_here(single(folder, split="1"))
    assert streams.train is not None
    assert (streams.valid, streams.test) == (None, None)
    streams = open_here(single(folder), SplitCounts(train=100, valid=0, test=0))
    assert (streams.valid, streams.test) == (None, None)


def test_a_stream_with_an_empty_head_is_still_a_stream(tmp_path):
    prefix = write_dataset(tmp_path / "tiny", [[1, 2, 3]])
    settings = StreamSettings(seq_length=2, seed=1, data_path=prefix, split="1")
    stream = open_here(settings, SplitCounts(1, 0, 0)).train
    assert len(stream) == 0
    assert stream
    assert stream.read(np.arange(9)).tolist() == [[1, 2, 3]] * 9


def test_storage_types_are_kept_or_widened(tmp_path):
    narrow = write_dataset(tmp_path / "narrow", [[65535, 7, 8, 9]])
    wide = write_dataset(tmp_path / "wide", [[70000, 1, 2, 3]], np.int32)
    settings = StreamSettings(seq_length=3, seed=1, train_data_paths=(narrow, narrow))
    assert open_here(settings).train.dtype == np.uint16
    settings = StreamSettings(seq_length=3, seed=1, train_data_paths=(narrow, wide))
    tokens = open_here(settings).train.read(np.arange(4))
    assert tokens.dtype == np.int32
    assert {65535, 70000} <= set(tokens.ravel().tolist()) <= {65535, 7, 8, 9, 70000, 1, 2, 3}


def test_weights_by_documents_override_given_ones(folder):
    stream = open_here(
        blended(
            folder, "abc", (1.0, 1.0, 1.0), weight_by_num_documents=True, weighted_sampler_alpha=0.3
        )
    ).train
    counts = np.array([400, 150, 60]) / 610
    smoothed = counts**0.3 * (1 - counts)
    assert stream.blend.weights == pytest.approx(smoothed / smoothed.sum())


def test_train_epochs_begin_with_one_epoch_and_end_with_whole_blocks(folder):
    requested = requested_samples(
        train_iters=None, train_batch_size=8, eval_interval=10, eval_iters=1
    )
    streams = open_here(single(folder, split="1", train_epochs=3), requested)
    assert list(folder.glob("*_train_indexmap_Nonens_64sl_1234s_packedpi_ac_*.npy"))
    order = streams.train.orders[0]
    assert order.head.num_samples == order.block(1).num_samples == (59022 - 1) // 64
    steps = train_iters_for_epochs(3, [order.head.num_samples], 8)
    last = streams.train.locate([steps * 8 - 1])
    assert last.block.tolist() == [2]


def test_allow_chopped_is_a_part_of_names_alone(folder):
    with_it = open_here(single(folder)).train.read(np.arange(50))
    without = open_here(single(folder, allow_chopped=False)).train.read(np.arange(50))
    assert np.array_equal(with_it, without)
    assert list(folder.glob("*_100ns_64sl_1234s_packedpi_doc_idx.npy"))


def test_large_tail_blocks_are_kept_in_files(folder, monkeypatch):
    expected = open_here(single(folder)).train.read(np.arange(2000))
    monkeypatch.setattr("megatron.stream.component_plans._TAIL_BYTES_IN_MEMORY", 0)
    for _ in range(2):
        assert np.array_equal(open_here(single(folder)).train.read(np.arange(2000)), expected)
    assert len(list(folder.glob("*_tail1_0-388docs_64sl_1234s_packedpi_*.npy"))) == 3


def test_ranks_wait_for_the_builder_and_read_the_same(folder, tmp_path):
    def worker(context):
        built = folder / "built"

        def barrier():
            if context.rank == 0:
                built.touch()
            while not built.exists():
                pass

        streams = open_streams(
            blended(folder, weights=(0.7, 0.3)), ALL, is_builder=context.rank == 0, barrier=barrier
        )
        return streams.train.read(np.arange(300)).tobytes()

    results = run_ranks(worker, 2, tmp_path)
    assert results[0] == results[1]


def test_a_failing_builder_passes_the_barrier(folder, monkeypatch):
    def fail(request):
        raise DatasetError("disk full")

    monkeypatch.setattr("megatron.stream.component_plans.build_map_files", fail)
    passed = []
    with pytest.raises(DatasetError, match="disk full"):
        open_streams(single(folder), ALL, is_builder=True, barrier=lambda: passed.append(1))
    assert passed == [1]
    with pytest.raises(DatasetError, match="the process that builds them failed"):
        open_streams(single(folder), ALL, is_builder=False, barrier=lambda: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_impl": "cached"}, "data_impl=cached: the legacy format cannot be read"),
        ({"data_path": None}, "give either data_path or train_data_paths"),
        ({"train_data_paths": ("x",)}, "give either data_path or train_data_paths"),
        (
            {"train_epochs": 2, "weight_by_num_documents": True},
            "train_epochs does not go together with weight_by_num_documents",
        ),
        (
            {"train_epochs": 2, "train_data_weights": (1.0, 2.0)},
            r"train_epochs needs equal weights, got train_data_weights=\[1.0, 2.0\]",
        ),
    ],
)
def test_contradicting_keys_are_refused(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        open_here(single(folder, **changes))


def test_weights_must_match_the_datasets(folder):
    with pytest.raises(ConfigError, match="train_data_weights has 3 weights for 2 datasets"):
        open_here(blended(folder, weights=(1.0, 1.0, 1.0)))


def test_a_missing_dataset_is_named(folder):
    with pytest.raises(DatasetError, match=r"nowhere\.idx and .*nowhere\.bin do not exist"):
        open_here(single(folder, data_path=str(folder / "nowhere")))


def test_numbers_with_fractions_are_no_tokens(tmp_path):
    prefix = write_dataset(tmp_path / "f", [[1.5]], np.float32)
    with pytest.raises(DatasetError, match="holds float32; tokens must be integers"):
        open_here(StreamSettings(seq_length=4, seed=1, data_path=prefix))


def test_documents_without_tokens_are_refused(tmp_path):
    prefix = write_dataset(tmp_path / "e", [[], [], []])
    with pytest.raises(DatasetError, match=r"\(train\): 3 documents without tokens"):
        open_here(StreamSettings(seq_length=4, seed=1, data_path=prefix, split="1"))
