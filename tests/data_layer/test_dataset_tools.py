"""Joining, counting and preparing datasets, and the corpus every machine has."""

import json
import zipfile

import numpy as np
import pytest

import prepare_data
from megatron.base.errors import ConfigError, DatasetError
from megatron.data.indexed_dataset import MMapIndexedDataset, make_builder
from tests.data_layer.corpus import TOKENIZER_JSON
from tools.datasets import corpora, dataset_token_count, merge_datasets, stdlib_corpus


def build(prefix, documents, vocab_size=300, *, with_doc_idx=True):
    builder = make_builder(f"{prefix}.bin", "mmap", vocab_size)
    for document in documents:
        builder.add_item(np.array(document, dtype=builder.dtype))
        if with_doc_idx:
            builder.end_document()
    builder.finalize(f"{prefix}.idx")


def open_dataset(prefix):
    return MMapIndexedDataset(str(prefix), skip_warmup=True)


def merge(folder, output):
    merge_datasets.main(["--input", str(folder), "--output-prefix", str(output)])


def test_a_joined_dataset_equals_one_built_at_once(tmp_path):
    first, second, third = [[1, 2, 3], [4]], [[5, 6]], [[7], [8, 9, 10], [11]]
    parts = tmp_path / "parts"
    parts.mkdir()
    build(parts / "b", second, with_doc_idx=False)  # as NeoX's own merge leaves it
    build(parts / "c", third)
    build(parts / "a", first)
    merge(parts, tmp_path / "whole")
    build(tmp_path / "direct", [*first, *second, *third])
    for suffix in (".bin", ".idx"):
        joined = (tmp_path / f"whole{suffix}").read_bytes()
        assert joined == (tmp_path / f"direct{suffix}").read_bytes()


def test_shards_are_joined_in_place(tmp_path):
    build(tmp_path / "a", [[1, 2, 3, 4, 5]])
    content = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").unlink()
    (tmp_path / "a-00000-of-00001.bin").write_bytes(content[:5])  # inside a token
    (tmp_path / "a-00001-of-00001.bin").write_bytes(content[5:])
    merge(tmp_path, tmp_path / "out" / "whole")
    assert open_dataset(tmp_path / "out" / "whole")[0].tolist() == [1, 2, 3, 4, 5]


def test_what_cannot_be_joined_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(DatasetError, match=r"no dataset in .*: no file there ends in .idx"):
        merge(tmp_path, tmp_path / "whole")
    build(tmp_path / "a", [[1]])
    with pytest.raises(DatasetError, match="would replace one of the datasets to join"):
        merge(tmp_path, tmp_path / "a")
    build(tmp_path / "b", [[1]], vocab_size=100_000)
    with pytest.raises(DatasetError, match=r"a holds uint16 and .*b int32: they cannot be joined"):
        merge(tmp_path, tmp_path / "whole")
    (tmp_path / "b.idx").unlink()
    with pytest.raises(DatasetError, match=r"without an .idx of the same name: b.bin"):
        merge(tmp_path, tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "b.bin"]


def test_tokens_are_counted(tmp_path, capsys):
    build(tmp_path / "a", [[1, 2, 3], [4]])
    build(tmp_path / "b", [[5]])
    dataset_token_count.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'a'}: 4 tokens",
        f"{tmp_path / 'b'}: 1 tokens",
        "total: 5 tokens",
    ]


def test_the_library_corpus_is_real_text_of_at_most_the_asked_size(tmp_path):
    outputs = []
    for name in ("one.jsonl", "two.jsonl"):
        stdlib_corpus.main(["--output", str(tmp_path / name), "--max-bytes", "400000"])
        outputs.append((tmp_path / name).read_bytes())
    assert outputs[0] == outputs[1]
    texts = [json.loads(line)["text"] for line in outputs[0].decode().splitlines()]
    assert 380_000 < sum(len(text.encode()) for text in texts) <= 400_000
    assert len(texts) > 10
    assert any("def " in text for text in texts)


def test_a_size_too_small_for_any_file_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no text of at most 0 bytes found in"):
        stdlib_corpus.main(["--output", str(tmp_path / "x.jsonl"), "--max-bytes", "0"])


def prepare(tmp_path, *more):
    prepare_data.main([*more, "-d", str(tmp_path), "-t", "HFTokenizer", "-v", str(TOKENIZER_JSON)])


def test_files_already_there_are_tokenized_without_a_download(tmp_path, capsys):
    (tmp_path / "enwik8").mkdir()
    with zipfile.ZipFile(tmp_path / "enwik8" / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", "the cat")
    prepare(tmp_path)
    prefix = tmp_path / "enwik8" / "enwik8_text_document"
    assert f"data_path: {prefix}" in capsys.readouterr().out
    assert open_dataset(prefix)[0].tolist() == [295, 70, 222, 68, 260, 0]


def test_downloads_are_whole_or_name_where_to_put_the_file(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"new")
    target = tmp_path / "folder" / "target"
    assert corpora.download(source.as_uri(), target).read_bytes() == b"new"
    source.write_bytes(b"newer")
    assert corpora.download(source.as_uri(), target).read_bytes() == b"new"
    assert corpora.download(source.as_uri(), target, force=True).read_bytes() == b"newer"
    source.unlink()
    with pytest.raises(DatasetError, match=rf"cannot download .*Put the file at {target}"):
        corpora.download(source.as_uri(), target, force=True)
    assert target.read_bytes() == b"newer"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_unknown_corpora_and_those_without_a_source_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="pile is known to NeoX, not supported here yet"):
        prepare(tmp_path, "pile")
    with pytest.raises(ConfigError, match="unknown dataset 'wiki'; choose one of enwik8"):
        prepare(tmp_path, "wiki")
