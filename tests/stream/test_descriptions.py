"""An order is pinned by its description, whatever a later configuration asks for."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.base.errors import DatasetError
from megatron.stream.descriptions import (
    describe_streams,
    epoch_samples,
    map_names,
    open_order,
    open_order_alone,
)
from megatron.stream.order_description import OrderDescription
from megatron.stream.stream_settings import DatasetFiles, identify_datasets
from megatron.stream.streams import SplitCounts, StreamSettings, open_streams
from tests.stream.recorded import DATA, copy_datasets, write_dataset

CORPUS = "corpus_a_text_document"


@pytest.fixture
def folder(tmp_path):
    copy_datasets(DATA / "oracle", tmp_path)
    return tmp_path


def single(folder, **changes):
    settings = StreamSettings(seq_length=64, seed=1234, data_path=str(folder / CORPUS))
    return dataclasses.replace(settings, **changes)


def blended(folder, **changes):
    settings = StreamSettings(
        seq_length=64,
        seed=1234,
        train_data_paths=tuple(str(folder / f"corpus_{name}_text_document") for name in "ab"),
        train_data_weights=(0.7, 0.3),
    )
    return dataclasses.replace(settings, **changes)


def described(settings, num_samples, split="train"):
    counts = SplitCounts(num_samples, num_samples, num_samples)
    return describe_streams(settings, counts, identify_datasets(settings))[split]


def locator(settings):
    found = {one.digest: files for files, one in identify_datasets(settings).items()}
    return found.__getitem__


def reopened(order, settings, num_samples):
    """Open an order in a run whose configuration asks for ``num_samples`` now."""
    identities = identify_datasets(settings)
    names = map_names(settings, SplitCounts(num_samples, 0, 0), identities)["train"]
    return open_order(order, locator(settings), names=names, is_builder=True, barrier=lambda: None)


def maps(folder):
    return sorted(path.name for path in folder.glob("*_doc_idx.npy"))


def test_a_single_datasets_orders_are_its_splits(folder):
    settings = single(folder, split="900,70,30")
    orders = describe_streams(settings, SplitCounts(2000, 48, 0), identify_datasets(settings))
    (train,) = orders["train"].components
    assert (train.first_document, train.stop_document, train.head_epochs) == (0, 360, 3)
    (valid,) = orders["valid"].components
    assert (valid.first_document, valid.stop_document, valid.head_epochs) == (360, 388, 1)
    assert orders["test"] is None
    assert orders["train"].weights is None
    assert train.dataset == valid.dataset
    assert train.start == train.occurrence == 0


def test_a_blend_has_normalised_weights_and_counts_equal_datasets(folder):
    path = str(folder / CORPUS)
    order = described(
        blended(folder, train_data_paths=(path, path), train_data_weights=(3.0, 1.0)), 2000
    )
    assert order.weights == (0.75, 0.25)
    assert [one.occurrence for one in order.components] == [0, 1]
    assert [one.head_epochs for one in order.components] == [2, 1]
    assert len({one.key for one in order.components}) == 2


def test_the_name_of_an_order_is_content_alone(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(folder / f"{CORPUS}{suffix}", elsewhere / f"renamed{suffix}")
    content = (elsewhere / "renamed.bin").read_bytes()
    (elsewhere / "renamed.bin").unlink()
    (elsewhere / "renamed-00000-of-00001.bin").write_bytes(content[:33_333])
    (elsewhere / "renamed-00001-of-00001.bin").write_bytes(content[33_333:])
    settings = single(folder, data_path=str(elsewhere / "renamed"))
    assert described(settings, 160).order_id == described(single(folder), 160).order_id
    expected = open_order_alone(described(single(folder), 160), locator(single(folder)))
    moved = open_order_alone(described(single(folder), 160), locator(settings))
    assert np.array_equal(moved.read(range(2000)), expected.read(range(2000)))


@pytest.mark.parametrize(
    "change",
    [{"seed": 5}, {"seq_length": 32}, {"split": "800, 100, 100"}, {"pack_impl": "unpacked"}],
)
def test_what_changes_samples_changes_the_name(folder, change):
    assert described(single(folder, **change), 160) != described(single(folder), 160)


def test_what_changes_no_samples_keeps_the_name(folder):
    expected = described(single(folder), 160)
    assert described(single(folder, allow_chopped=False), 160) == expected
    assert described(single(folder), 500) == expected  # also one epoch
    assert described(single(folder, pack_impl="unpacked", allow_chopped=False), 160) != described(
        single(folder, pack_impl="unpacked"), 160
    )


@pytest.mark.parametrize("make", [single, blended])
def test_a_description_survives_json(folder, make):
    order = described(make(folder, pack_impl="pack_until_overflow"), 160)
    assert OrderDescription.from_json(order.to_json()) == order


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    first=st.integers(1, 60),
    later=st.integers(1, 300),
    packing=st.sampled_from(["packed", "unpacked", "pack_until_overflow"]),
    num_datasets=st.integers(1, 2),
)
def test_an_order_does_not_depend_on_the_later_length(
    tmp_path_factory, sizes, first, later, packing, num_datasets
):
    folder = tmp_path_factory.mktemp("order")
    documents = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    paths = [write_dataset(folder / f"d{i}", documents[:: 1 - 2 * i]) for i in range(num_datasets)]
    stream_settings = StreamSettings(
        seq_length=3, seed=9, train_data_paths=tuple(paths), pack_impl=packing
    )
    order = described(stream_settings, first)
    positions = range(max(first, later) + 10)
    expected = open_streams(
        stream_settings, SplitCounts(first, 0, 0), is_builder=True, barrier=lambda: None
    ).train.read(positions)
    assert np.array_equal(reopened(order, stream_settings, first).read(positions), expected)
    # What the longer run would have is there too, and must not be taken for it.
    open_streams(stream_settings, SplitCounts(later, 0, 0), is_builder=True, barrier=lambda: None)
    for _ in range(2):
        extended = reopened(order, stream_settings, later)
        assert extended.description == order
        assert np.array_equal(extended.read(positions), expected)
        for path in folder.glob("*.npy"):
            path.unlink()


def test_an_extended_run_finds_the_maps_it_began_with(folder):
    order = described(single(folder), 160)
    reopened(order, single(folder), 160)
    before = maps(folder)
    assert before == [f"{CORPUS}_train_indexmap_160ns_64sl_1234s_packedpi_ac_doc_idx.npy"]
    reopened(order, single(folder), 3000)
    assert maps(folder) == before


def test_an_extended_run_finds_maps_that_neox_wrote(folder):
    stem = f"{CORPUS}_train_indexmap_160ns_64sl_1234s_packedpi_ac"
    for name in ("doc_idx", "sample_idx", "shuffle_idx"):
        shutil.copy(DATA / "oracle" / f"{stem}_{name}.npy", folder)
    settings = single(folder, split="900,70,30")
    reopened(described(settings, 160), settings, 3000)
    assert maps(folder) == [f"{stem}_doc_idx.npy"]


def test_maps_that_are_lost_are_built_again_under_no_name_of_neoxs(folder):
    order = described(single(folder), 160)
    expected = reopened(order, single(folder), 160).read(range(900))
    for path in folder.glob("*indexmap*"):
        path.unlink()
    assert np.array_equal(reopened(order, single(folder), 3000).read(range(900)), expected)
    assert maps(folder) == [f"{CORPUS}_indexmap_0-388docs_1ep_64sl_1234s_packedpi_doc_idx.npy"]


def test_equal_maps_get_a_second_name_instead_of_being_built(folder, monkeypatch):
    first = reopened(described(single(folder), 160), single(folder), 160)
    monkeypatch.setattr("megatron.stream.map_recipes.PackedRecipe.write", None)
    second = reopened(described(single(folder), 170), single(folder), 170)
    assert np.array_equal(first.read(range(900)), second.read(range(900)))
    stem = f"{CORPUS}_train_indexmap_{{}}ns_64sl_1234s_packedpi_ac_shuffle_idx.npy"
    inodes = {os.stat(folder / stem.format(count)).st_ino for count in (160, 170)}
    assert len(inodes) == 1


def test_others_maps_get_no_second_name(folder):
    """They fit the dataset, but whether they are shuffled as NeoX does was not checked."""
    reopened(described(single(folder), 160), single(folder), 160)
    stem = f"{folder / CORPUS}_train_indexmap_160ns_64sl_1234s_packedpi_ac"
    shuffle_idx = np.load(f"{stem}_shuffle_idx.npy")
    os.unlink(f"{stem}_shuffle_idx.npy")
    np.save(f"{stem}_shuffle_idx.npy", shuffle_idx[::-1])
    odd = reopened(described(single(folder), 160), single(folder), 160)
    right = reopened(described(single(folder), 170), single(folder), 170)
    assert odd.locate(range(5)).sample.tolist() == shuffle_idx[:-6:-1].tolist()
    assert right.locate(range(5)).sample.tolist() == shuffle_idx[:5].tolist()


def test_a_touched_dataset_of_the_same_content_is_not_checked_again(folder, monkeypatch):
    order = described(single(folder), 160)
    reopened(order, single(folder), 160)
    os.utime(folder / f"{CORPUS}.idx", ns=(1, 1))
    monkeypatch.setattr("megatron.stream.map_recipes.PackedRecipe.problem_of_content", None)
    reopened(order, single(folder), 160)


def test_queries_need_no_builder_and_no_writable_folder(folder, monkeypatch):
    settings = single(folder)
    order = described(settings, 160)
    expected = reopened(order, settings, 160).read(range(900))
    for path in folder.glob("*indexmap*"):
        path.unlink()

    def refuse(self, paths):
        raise PermissionError("read-only")

    monkeypatch.setattr("megatron.stream.map_recipes.PackedRecipe.write", refuse)
    stream = open_order_alone(order, lambda digest: settings.data_path)
    assert np.array_equal(stream.read(range(900)), expected)
    assert not maps(folder)


def test_a_dataset_too_short_is_refused(folder):
    order = described(single(folder), 160)
    other = str(folder / "corpus_c_text_document")
    with pytest.raises(
        DatasetError, match=r"has 60 documents, but the order reads 0\.\.387: it is another dataset"
    ):
        open_order_alone(order, lambda digest: other)


def test_sizes_that_contradict_offsets_are_refused(folder):
    path = folder / f"{CORPUS}.idx"
    content = bytearray(path.read_bytes())
    content[34:38] = np.array([1], dtype="<i4").tobytes()
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"tokens by their sizes and \d+ by their offsets"):
        open_streams(single(folder), SplitCounts(10, 0, 0), is_builder=True, barrier=lambda: None)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"pack_impl": "unpacked"},
        {"pack_impl": "pack_until_overflow"},
        {"data_order": "sequential", "seq_length": 2},
    ],
)
def test_samples_of_a_pass_are_those_of_a_tail_block(tmp_path, keys):
    paths = tuple(
        write_dataset(tmp_path / name, np.arange(3 * size).reshape(size, 3))
        for name, size in (("d", 20), ("e", 31))
    )
    settings = StreamSettings(**{"seq_length": 7, "seed": 2, "train_data_paths": paths, **keys})
    order = described(settings, 10)
    counts = epoch_samples(order, locator(settings))
    stream = open_order_alone(order, locator(settings))
    for component, one in zip(order.components, stream.orders, strict=True):
        (block,) = {block for block, _, _ in one.tail.pieces(0, counts[component.key])}
        assert block == 1
        (_, last, _), (then, _, _) = one.tail.pieces(
            counts[component.key] - 1, counts[component.key] + 1
        )
        assert (last.stop, then) == (counts[component.key], 2)


def test_datasets_are_named_with_their_labels(folder):
    settings = blended(
        folder,
        train_label_data_paths=tuple(str(folder / f"corpus_{name}_text_document") for name in "ab"),
    )
    path = str(folder / CORPUS)
    identities = identify_datasets(settings)
    assert DatasetFiles(path, path) in identities
    plain = identify_datasets(blended(folder))[DatasetFiles(path)]
    assert identities[DatasetFiles(path, path)].digest != plain.digest
    assert DatasetFiles(path, path).companions == (("label", path),)


def test_a_failing_builder_lets_the_others_fail_too(folder, monkeypatch):
    def fail(request):
        raise DatasetError("disk full")

    settings = single(folder)
    order = described(settings, 160)
    passed = []
    monkeypatch.setattr("megatron.stream.component_plans.build_map_files", fail)
    with pytest.raises(DatasetError, match="disk full"):
        open_order(order, locator(settings), is_builder=True, barrier=lambda: passed.append(1))
    assert passed == [1]
    with pytest.raises(DatasetError, match="the process that builds them failed"):
        open_order(order, locator(settings), is_builder=False, barrier=lambda: None)
