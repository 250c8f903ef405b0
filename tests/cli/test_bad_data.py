"""Data that can't be used: found on the ranks before a model is built, told once."""

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.cli import train
from tests.cli.bad_runs import NUM_DOCUMENTS, the_one_message, train_in_forked_ranks, write_dataset
from tests.worlds import WorldFailed

pytestmark = pytest.mark.distributed

TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer" / "tok.json"
IDX_HEADER_BYTES = 34
DTYPE_CODE_AT = 17


@pytest.fixture(autouse=True)
def no_model_is_built(monkeypatch):
    def build(*_, **__):
        raise AssertionError("a model is built though the data can't be used")

    monkeypatch.setattr(train, "_build_module", build)


@pytest.fixture
def text(tmp_path):
    """The prefix of a small dataset."""
    write_dataset(tmp_path / "text")
    return tmp_path / "text"


def cut(path, *, to_bytes):
    with open(path, "r+b") as file:
        file.truncate(to_bytes)


def overwrite(path, position, data):
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(data)


def refused(directory, **keys):
    """Return what a run with ``keys`` on one rank fails with, without the error's type."""
    message = the_one_message(train_in_forked_ranks(directory, **keys))
    assert message.startswith("rank 0: ")
    return message.removeprefix("rank 0: ").rstrip("\n")


def test_without_damage_a_model_would_be_built(tmp_path, text):
    with pytest.raises(WorldFailed, match="a model is built though"):
        train_in_forked_ranks(tmp_path)


@pytest.mark.parametrize("missing", [("idx",), ("bin",), ("idx", "bin")])
def test_missing_files_of_a_dataset_are_named(tmp_path, text, missing):
    for suffix in missing:
        os.unlink(f"{text}.{suffix}")
    names = " and ".join(f"{text}.{suffix}" for suffix in missing)
    verb = "does" if len(missing) == 1 else "do"
    assert refused(tmp_path) == (
        f"DatasetError: dataset {text}: {names} {verb} not exist; a dataset is named by its path "
        "without .bin and .idx"
    )


def test_a_dataset_named_with_its_suffix_is_told_how_it_is_named(tmp_path, text):
    message = refused(tmp_path, data_path=f"{text}.bin")
    assert message.startswith(f"DatasetError: dataset {text}.bin: {text}.bin.idx and ")
    assert message.endswith("a dataset is named by its path without .bin and .idx")


def test_a_truncated_index_is_found(tmp_path, text):
    whole = os.path.getsize(f"{text}.idx")
    cut(f"{text}.idx", to_bytes=whole - 3)
    assert refused(tmp_path) == (
        f"DatasetError: {text}.idx: truncated: {whole - 3} bytes, but {NUM_DOCUMENTS} sizes and "
        f"pointers and {NUM_DOCUMENTS + 1} document indices take {whole}; copy or build it again"
    )


def test_an_index_cut_within_its_header_is_found(tmp_path, text):
    cut(f"{text}.idx", to_bytes=20)
    assert refused(tmp_path) == (
        f"DatasetError: {text}.idx: truncated: 20 bytes, the header alone has {IDX_HEADER_BYTES}; "
        "copy or build it again"
    )


def test_an_empty_index_and_another_file_are_no_index(tmp_path, text):
    cut(f"{text}.idx", to_bytes=0)
    assert refused(tmp_path).startswith(f"DatasetError: {text}.idx: not a dataset index: it begins")
    Path(f"{text}.idx").write_bytes(b"PK\x03\x04" * 100)
    assert "instead of b'MMIDIDX\\x00\\x00'" in refused(tmp_path)


def test_an_unknown_storage_type_is_found(tmp_path, text):
    overwrite(f"{text}.idx", DTYPE_CODE_AT, b"\x0b")
    assert refused(tmp_path) == (
        f"DatasetError: {text}.idx: dtype code 11 is unknown; known are 1..8; the file is "
        "damaged: copy or build it again"
    )


def test_the_wrong_storage_type_is_found_by_the_length_of_the_tokens(tmp_path, text):
    overwrite(f"{text}.idx", DTYPE_CODE_AT, b"\x04")  # int32, but uint16 was written
    message = refused(tmp_path)
    assert message.startswith(f"DatasetError: {text}.bin: {os.path.getsize(f'{text}.bin')} bytes, ")
    assert f"{NUM_DOCUMENTS} documents of int32" in message


def test_tokens_that_are_no_whole_numbers_are_refused(tmp_path):
    write_dataset(tmp_path / "text", dtype=np.float32)
    assert refused(tmp_path) == (
        f"DatasetError: {tmp_path}/text holds float32; tokens must be integers"
    )


def test_tokens_that_end_before_their_index_says_are_found(tmp_path, text):
    whole = os.path.getsize(f"{text}.bin")
    cut(f"{text}.bin", to_bytes=whole - 1)
    assert refused(tmp_path) == (
        f"DatasetError: {text}.bin: {whole - 1} bytes, shorter than the {whole} that {text}.idx "
        f"says ({NUM_DOCUMENTS} documents of uint16); the two are not from one run, or a copy was "
        "cut off"
    )


def test_an_index_of_another_version_is_refused(tmp_path, text):
    overwrite(f"{text}.idx", 9, struct.pack("<Q", 2))
    assert "version 2 of the format; only 1 is known" in refused(tmp_path)


def test_one_dataset_of_many_is_named(tmp_path, text):
    keys = {f"{split}_data_paths": [str(text)] for split in ("valid", "test")}
    shutil.copy(f"{text}.idx", tmp_path / "second.idx")
    paths = [str(text), str(tmp_path / "second")]
    message = refused(tmp_path, data_path=None, train_data_paths=paths, **keys)
    assert f"dataset {tmp_path}/second: {tmp_path}/second.bin does not exist" in message


@pytest.mark.parametrize("split", ["0,1,1", "0.001,1,0"])
def test_an_empty_train_split_is_refused(tmp_path, text, split):
    assert refused(tmp_path, split=split) == (
        f"ConfigError: there is no training data: the train share of split={split!r} is no "
        f"document of {text}. Give train a larger share, or a larger dataset"
    )


def test_a_split_that_is_no_numbers_is_refused(tmp_path, text):
    assert refused(tmp_path, split="most, rest") == (
        "ConfigError: split='most, rest' must be up to three numbers divided by commas or slashes, "
        "such as '969, 30, 1'"
    )


def test_epochs_that_make_no_step_are_refused(tmp_path, text):
    keys = {"train_iters": None, "train_epochs": 1, "train_micro_batch_size_per_gpu": 500}
    assert refused(tmp_path, **keys).startswith(
        "ConfigError: train_epochs=1: the training data ends before the first step, which takes "
        "500 samples (train_batch_size)"
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vocab_file": None}, "HFTokenizer needs vocab_file, which is not set"),
        (
            {"vocab_file": "nowhere/tok.json"},
            f"HFTokenizer: vocab_file='nowhere/tok.json' is not a file (looked in {os.getcwd()})",
        ),
        (
            {"vocab_file": str(TOKENIZER), "tokenizer_type": "GPT2BPETokenizer"},
            "GPT2BPETokenizer needs merge_file, which is not set",
        ),
    ],
)
def test_a_missing_vocabulary_is_named(tmp_path, text, keys, message):
    keys = {"tokenizer_type": "HFTokenizer", **keys}
    assert refused(tmp_path, **keys) == f"ConfigError: {message}"


def test_a_damaged_vocabulary_is_named(tmp_path, text):
    damaged = tmp_path / "tok.json"
    damaged.write_bytes(TOKENIZER.read_bytes()[:1000])
    message = refused(tmp_path, tokenizer_type="HFTokenizer", vocab_file=str(damaged))
    assert message.startswith(f"ConfigError: HFTokenizer cannot read vocab_file {damaged}: ")


def test_an_mlp_that_tensor_ranks_cannot_share_is_refused(tmp_path, text):
    keys = {"num_gpus": 2, "model_parallel_size": 2, "intermediate_size": 31}
    message = the_one_message(train_in_forked_ranks(tmp_path, **keys))
    assert "(31) must be a multiple of model_parallel_size (2)" in message


def test_of_four_ranks_one_tells_what_is_wrong(tmp_path, text):
    os.unlink(f"{text}.bin")
    keys = {"num_gpus": 4, "model_parallel_size": 2, "pipe_parallel_size": 2}
    message = the_one_message(train_in_forked_ranks(tmp_path, **keys))
    assert message.startswith(f"rank 0: DatasetError: dataset {text}: {text}.bin does not exist")
    assert message.count("\n") == 1
