"""Tokenizing text into datasets: the bytes NeoX writes, whole or not at all."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron.base.errors import ConfigError, DatasetError
from megatron.data.indexed_dataset import MMapIndexedDataset
from tests.data_layer.corpus import BIN_SHA256, RECORDED, TOKENIZER_JSON
from tools.datasets import preprocess_data

ROOT = Path(__file__).parents[2]


def preprocess(source, prefix, *more, tokenizer=("HFTokenizer", TOKENIZER_JSON)):
    kind, vocab_file = tokenizer
    preprocess_data.main(
        ["--input", str(source), "--output-prefix", str(prefix), "--tokenizer-type", kind]
        + (["--vocab", str(vocab_file)] if vocab_file else [])
        + list(more)
    )


def documents(prefix):
    dataset = MMapIndexedDataset(str(prefix), skip_warmup=True)
    return [dataset[number].tolist() for number in range(len(dataset))]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("corpus", sorted(BIN_SHA256))
def test_bytes_are_those_neox_wrote(corpus, tmp_path, capsys):
    preprocess(RECORDED / f"{corpus}.jsonl.gz", tmp_path / corpus, "--append-eod")
    written = tmp_path / f"{corpus}_text_document"
    recorded_index = RECORDED / f"{corpus}_text_document.idx"
    assert written.with_suffix(".idx").read_bytes() == recorded_index.read_bytes()
    digest = hashlib.sha256(written.with_suffix(".bin").read_bytes()).hexdigest()
    assert digest == BIN_SHA256[corpus]
    out = capsys.readouterr().out
    assert "Vocab size: 300\n" in out
    assert f"Output prefix: {tmp_path / corpus}\n" in out


def test_workers_do_not_change_the_bytes(tmp_path):
    lines = [{"text": f"document {n} " + "cat mat " * (n % 90)} for n in range(1500)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for workers in ("1", "2"):
        preprocess(tmp_path / "many.jsonl", tmp_path / workers, "--workers", workers)
    for suffix in (".bin", ".idx"):
        one, two = (tmp_path / f"{workers}_text_document{suffix}" for workers in "12")
        assert one.read_bytes() == two.read_bytes()
    assert len(documents(tmp_path / "1_text_document")) == 1500


def test_inputs_are_read_in_the_order_given(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.txt").write_text("B")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "A"}\n'))
    alone = tmp_path / "z.jsonl.zst"
    alone.write_bytes(zstandard.compress(b'{"text": "Z"}\n{"text": ""}\n'))
    character_level = ("charleveltokenizer", None)
    preprocess(f"{alone},{folder}", tmp_path / "out", "--append-eod", tokenizer=character_level)
    expected = [[ord(letter), 0] for letter in "ZAB"]
    assert documents(tmp_path / "out_text_document") == expected


def test_each_key_is_a_dataset_of_its_own(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"q": "a", "a": "b"}\n{"q": "", "a": "c"}\n')
    keys = ("--jsonl-keys", "q", "a")
    preprocess(tmp_path / "x.jsonl", tmp_path / "x", *keys, tokenizer=("CharLevelTokenizer", None))
    assert documents(tmp_path / "x_q_document") == [[ord("a")]]
    assert documents(tmp_path / "x_a_document") == [[ord("b")], [ord("c")]]


@pytest.mark.parametrize(("num_tokens", "dtype"), [(300, np.uint16), (65600, np.int32)])
def test_the_storage_type_follows_the_vocabulary(tmp_path, num_tokens, dtype):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {str(number): number for number in range(num_tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "x.txt").write_text(f"7 {num_tokens - 1}")
    kind = ("HFTokenizer", tmp_path / "words.json")
    preprocess(tmp_path / "x.txt", tmp_path / "x", tokenizer=kind)
    dataset = MMapIndexedDataset(str(tmp_path / "x_text_document"), skip_warmup=True)
    assert dataset.dtype == dtype
    assert dataset[0].tolist() == [7, num_tokens - 1]


def test_documents_without_tokens_are_left_out_and_counted(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "x.jsonl").write_text('"a a"\n"   "\n"a"\n')
    kind = ("HFTokenizer", tmp_path / "words.json")
    preprocess(tmp_path / "x.jsonl", tmp_path / "x", "--append-eod", tokenizer=kind)
    assert documents(tmp_path / "x_text_document") == [[1, 1, 0], [1, 0]]
    assert "2 documents, 5 tokens; 1 documents gave no token" in capsys.readouterr().out


def test_ftfy_repairs_text_first(tmp_path):
    (tmp_path / "x.txt").write_text("schÃ¶n")
    kind = ("CharLevelTokenizer", None)
    preprocess(tmp_path / "x.txt", tmp_path / "x", "--ftfy", tokenizer=kind)
    assert documents(tmp_path / "x_text_document") == [list("schön".encode())]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_error_leaves_an_older_dataset_as_it_was(tmp_path, workers):
    source = tmp_path / "x.jsonl"
    source.write_text('"old"\n')
    preprocess(source, tmp_path / "x")
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if "_text_" in name}
    source.write_text('"new"\n' * 2000 + "{broken\n")
    with pytest.raises(DatasetError, match=r"x.jsonl:2001: not a line of JSON"):
        preprocess(source, tmp_path / "x", "--workers", workers)
    assert names(tmp_path) == ["x.jsonl", *sorted(before)]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_killed_run_leaves_no_dataset(tmp_path):
    feed = tmp_path / "x.jsonl"
    os.mkfifo(feed)
    process = subprocess.Popen(
        [
            sys.executable,
            "tools/datasets/preprocess_data.py",
            f"--input={feed}",
            f"--output-prefix={tmp_path / 'x'}",
            "--tokenizer-type=CharLevelTokenizer",
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with feed.open("w") as writer:
        writer.write('"text"\n' * 10_000)
        writer.flush()
        process.kill()
        process.wait()
    visible = [name for name in names(tmp_path) if not name.startswith(".")]
    assert visible == ["x.jsonl"]


def test_appending_an_end_the_vocabulary_lacks_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "words.json"))
    (tmp_path / "x.txt").write_text("a")
    kind = ("HFTokenizer", tmp_path / "words.json")
    with pytest.raises(ConfigError, match=r"--append-eod: HFTokenizer .* has no <\|endoftext\|>"):
        preprocess(tmp_path / "x.txt", tmp_path / "x", "--append-eod", tokenizer=kind)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset-impl", "cached"], "--dataset-impl cached is not supported; use mmap"),
        (["--workers", "0"], "--workers and --log-interval must be at least 1"),
        (["--tokenizer-type", "Bert"], "'Bert' is not known; choose one of GPT2BPETokenizer"),
    ],
)
def test_options_that_cannot_be_used_are_refused(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        preprocess(tmp_path / "x.txt", tmp_path / "x", *more)
    assert message in capsys.readouterr().err


def test_the_command_exits_with_one_line_on_bad_input(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "tools/datasets/preprocess_data.py",
            f"--input={tmp_path / 'absent.jsonl'}",
            f"--output-prefix={tmp_path / 'x'}",
            "--tokenizer-type=CharLevelTokenizer",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: input file ")
    assert "Traceback" not in done.stderr
