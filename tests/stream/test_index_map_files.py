"""Cache files: NeoX's names and bytes, v1.0's read, and stale ones never used silently."""

import dataclasses
import json
import logging
import os
import shutil

import numpy as np
import pytest

from megatron.base.errors import DatasetError
from megatron.stream.index_map_files import (
    MapRequest,
    build_map_files,
    open_map_files,
    open_or_build_maps,
)
from megatron.stream.index_maps import (
    PackedShape,
    count_tokens,
    epochs_needed,
)
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.map_recipes import PackedRecipe
from tests.stream.recorded import DATA, copy_datasets, write_dataset

RECORDED = DATA / "oracle" / "corpus_a_text_document_train_indexmap_160ns_64sl_1234s_packedpi_ac"
ARRAYS = ("doc_idx", "sample_idx", "shuffle_idx")


@pytest.fixture
def folder(tmp_path):
    copy_datasets(DATA / "oracle", tmp_path)
    return tmp_path


def request(folder, *, documents=range(360), suffix="_packedpi_ac", others=()):
    """The request of the recorded run a."""
    dataset = IndexedDataset(folder / "corpus_a_text_document")
    stem = f"{dataset.prefix}_train_indexmap_160ns_64sl_1234s"
    tokens = count_tokens(dataset.sizes, documents)
    shape = PackedShape(documents, tokens, epochs_needed(tokens, 64, 160), 64)
    recipe = PackedRecipe(dataset.sizes, shape, 1234)
    sources = (dataset.index.path,)
    return MapRequest(sources, recipe, stem + suffix, tuple(stem + o for o in others))


def put_recorded(folder, suffix="_packedpi_ac"):
    """Put the files NeoX wrote beside the dataset."""
    stem = folder / f"corpus_a_text_document_train_indexmap_160ns_64sl_1234s{suffix}"
    for name in ARRAYS:
        shutil.copy(f"{RECORDED}_{name}.npy", f"{stem}_{name}.npy")
    return stem


def inodes(stem):
    return [os.stat(f"{stem}_{name}.npy").st_ino for name in ARRAYS]


def assert_equal(maps, expected):
    for name in ARRAYS:
        assert np.array_equal(getattr(maps, name), getattr(expected, name)), name


def test_written_files_are_neoxs_bytes(folder):
    wanted = request(folder)
    build_map_files(wanted)
    for name, path in wanted.paths(wanted.stem).items():
        with open(f"{RECORDED}_{name}.npy", "rb") as recorded:
            assert path.read_bytes() == recorded.read()


def test_no_temporary_file_is_left(folder):
    wanted = request(folder)
    build_map_files(wanted)
    new = [path.name for path in folder.iterdir() if "indexmap" in path.name]
    assert len(new) == 4
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_neoxs_own_files_are_checked_once_and_kept(folder, monkeypatch):
    stem = put_recorded(folder)
    before = inodes(stem)
    wanted = request(folder)
    build_map_files(wanted)
    assert inodes(stem) == before

    def checked_again(*_):
        raise AssertionError("the sidecar should have sufficed")

    monkeypatch.setattr(PackedRecipe, "problem_of_content", checked_again)
    build_map_files(wanted)
    open_map_files(wanted)


def test_v1_files_are_used_where_main_has_none(folder):
    put_recorded(folder, suffix="")
    wanted = request(folder, others=("",))
    build_map_files(wanted)
    assert not list(folder.glob("*packedpi*"))
    assert open_map_files(wanted).num_samples == 830


def test_stale_v1_files_lead_to_new_ones_under_mains_name(folder):
    put_recorded(folder, suffix="")
    wanted = request(folder, documents=range(200), others=("",))
    build_map_files(wanted)
    assert len(list(folder.glob("*packedpi_ac_*.npy"))) == 3
    assert_equal(open_map_files(wanted), wanted.recipe.build())


def _other_split(folder):
    return request(folder, documents=range(200))


def _reordered_corpus(folder):
    dataset = IndexedDataset(folder / "corpus_a_text_document")
    write_dataset(folder / "reversed", [document.tolist() for document in dataset[::1][::-1]])
    for suffix in (".bin", ".idx"):
        os.replace(folder / f"reversed{suffix}", folder / f"corpus_a_text_document{suffix}")
    return request(folder, documents=range(400))


def _equal_sizes_other_order(folder):
    path = f"{put_recorded(folder)}_doc_idx.npy"
    doc_idx = np.load(path)
    np.save(path, doc_idx[::-1])
    return request(folder)


def _doubled_document(folder):
    path = f"{put_recorded(folder)}_doc_idx.npy"
    doc_idx = np.load(path)
    doc_idx[7] = doc_idx[8]
    np.save(path, doc_idx)
    return request(folder)


def _shifted_row(folder):
    path = f"{put_recorded(folder)}_sample_idx.npy"
    sample_idx = np.load(path)
    sample_idx[500, 1] += 1
    np.save(path, sample_idx)
    return request(folder)


def _doubled_sample(folder):
    path = f"{put_recorded(folder)}_shuffle_idx.npy"
    shuffle_idx = np.load(path)
    shuffle_idx[3] = shuffle_idx[4]
    np.save(path, shuffle_idx)
    return request(folder)


def _sample_out_of_range(folder):
    path = f"{put_recorded(folder)}_shuffle_idx.npy"
    shuffle_idx = np.load(path)
    shuffle_idx[3] = 830
    np.save(path, shuffle_idx)
    return request(folder)


def _truncated(folder):
    path = f"{put_recorded(folder)}_shuffle_idx.npy"
    os.truncate(path, 1000)
    return request(folder)


def _no_array_at_all(folder):
    stem = put_recorded(folder)
    with open(f"{stem}_sample_idx.npy", "wb") as file:
        file.write(b"not an array")
    return request(folder)


def _other_type(folder):
    path = f"{put_recorded(folder)}_doc_idx.npy"
    np.save(path, np.load(path).astype(np.int64))
    return request(folder)


@pytest.mark.parametrize(
    ("make_stale", "reason"),
    [
        (_other_split, "doc_idx is int32(360,), expected int32(200,)"),
        (_reordered_corpus, "doc_idx is int32(360,), expected int32(400,)"),
        (_equal_sizes_other_order, "sample_idx is not what the document sizes give"),
        (_doubled_document, "doc_idx is not 1 times documents 0..359"),
        (_shifted_row, "sample_idx is not what the document sizes give"),
        (_doubled_sample, "shuffle_idx is not a permutation"),
        (_sample_out_of_range, "shuffle_idx is not a permutation"),
        (_truncated, "shuffle_idx.npy cannot be read"),
        (_no_array_at_all, "sample_idx.npy cannot be read"),
        (_other_type, "doc_idx is int64(360,), expected int32(360,)"),
    ],
)
def test_stale_files_are_told_and_replaced(folder, caplog, make_stale, reason):
    put_recorded(folder)
    wanted = make_stale(folder)
    with caplog.at_level(logging.WARNING):
        build_map_files(wanted)
    assert reason in caplog.text
    assert_equal(open_map_files(wanted), wanted.recipe.build())


def test_a_sidecar_does_not_cover_files_replaced_later(folder, caplog):
    wanted = request(folder)
    build_map_files(wanted)
    put_recorded(folder)
    path = wanted.paths(wanted.stem)["shuffle_idx"]
    shuffle_idx = np.load(path)
    shuffle_idx[:2] = 0
    np.save(path, shuffle_idx)
    with caplog.at_level(logging.WARNING):
        build_map_files(wanted)
    assert "shuffle_idx is not a permutation" in caplog.text


def test_a_sidecar_does_not_cover_an_index_changed_later(folder, caplog):
    wanted = request(folder)
    build_map_files(wanted)
    dataset = IndexedDataset(folder / "corpus_a_text_document")
    documents = [document.tolist() for document in dataset]
    documents[0].append(documents[1].pop())
    write_dataset(folder / "corpus_a_text_document", documents)
    with caplog.at_level(logging.WARNING):
        build_map_files(request(folder))
    assert "the corpus has changed" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1}', "not json"])
def test_a_sidecar_of_another_kind_is_replaced(folder, content):
    wanted = request(folder)
    build_map_files(wanted)
    sidecar = folder / (wanted.stem.rpartition("/")[2] + "_checked.json")
    recorded = json.loads(sidecar.read_text())
    before = inodes(wanted.stem)
    sidecar.write_text(content)
    build_map_files(wanted)
    # What is known now is that the maps fit, not who made them.
    assert json.loads(sidecar.read_text()) == {**recorded, "origin": "checked"}
    assert inodes(wanted.stem) == before


def test_many_epochs_are_checked_beyond_the_small_counters(tmp_path):
    prefix = write_dataset(tmp_path / "d", [[1, 2, 3]])
    dataset = IndexedDataset(prefix)
    shape = PackedShape(range(1), 3, 400, 2)
    recipe = PackedRecipe(dataset.sizes, shape, 5)
    wanted = MapRequest((dataset.index.path,), recipe, prefix + "_many")
    build_map_files(wanted)
    os.unlink(prefix + "_many_checked.json")
    before = inodes(wanted.stem)
    build_map_files(wanted)
    assert inodes(wanted.stem) == before


def test_without_a_builder_opening_says_what_may_be_wrong(folder):
    with pytest.raises(DatasetError, match=r"are missing or do not fit .*use_shared_fs: false"):
        open_map_files(request(folder))


def test_stale_files_are_not_opened(folder):
    put_recorded(folder)
    with pytest.raises(DatasetError, match="are missing or do not fit"):
        open_map_files(request(folder, documents=range(200)))


def test_a_folder_that_cannot_be_written_is_named(folder):
    wanted = request(folder)
    blocked = dataclasses.replace(wanted, stem=str(folder / "absent" / "maps"))
    with pytest.raises(DatasetError, match=r"cannot write the index maps .* make the folder"):
        build_map_files(blocked)


def test_maps_nobody_can_write_are_computed_in_memory(folder, caplog):
    wanted = request(folder)
    blocked = dataclasses.replace(wanted, stem=str(folder / "absent" / "maps"))
    maps = open_or_build_maps(blocked)
    assert "in the memory of every reading process" in caplog.text
    assert_equal(maps, wanted.recipe.build())


def test_maps_wanted_at_any_time_are_built_by_whoever_comes_first(folder):
    wanted = request(folder)
    first = open_or_build_maps(wanted)
    before = inodes(wanted.stem)
    assert_equal(open_or_build_maps(wanted), first)
    assert inodes(wanted.stem) == before
