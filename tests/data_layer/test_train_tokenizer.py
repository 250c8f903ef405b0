"""Training a tokenizer: NeoX's own way of calling it, and what the result must be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.base.errors import ConfigError, DatasetError
from megatron.data.tokenizers import build_tokenizer
from megatron.tokenizer import train_tokenizer
from tests.data_layer.corpus import RECORDED

ROOT = Path(__file__).parents[2]


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [{"text": f"the cat number {n} sat on the mat, ﬁne"} for n in range(50)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "b.txt").write_text("another document about a cat\n")
    return folder


def train(folder, output, *more):
    arguments = ["--json_input_dir", str(folder), "--tokenizer_output_path", str(output), *more]
    train_tokenizer.main(train_tokenizer.parse_args(arguments))


def test_called_as_neoxs_own_test_does(text_folder, capsys):
    train(text_folder, "")
    assert "trained on 51 documents of 2 files" in capsys.readouterr().out
    assert sorted(path.name for path in text_folder.parent.iterdir()) == ["text"]


def test_a_trial_run_reports_a_missing_corpus(tmp_path, capsys):
    train(tmp_path / "absent.txt", "")
    assert "nothing to train on: input file" in capsys.readouterr().out


def test_the_tokenizer_is_byte_level_with_nfkc_and_neoxs_special_tokens(text_folder, tmp_path):
    train(text_folder, tmp_path / "out" / "tok.json", "-v", "300", "--tokenizer_type", "bpe")
    tokenizer = build_tokenizer("HFTokenizer", str(tmp_path / "out" / "tok.json"))
    assert tokenizer.vocab_size == 300
    assert tokenizer.eod == tokenizer.vocab["<|endoftext|>"] == 0
    assert tokenizer.vocab["<|padding|>"] == 1
    unseen = " Ünïcode 漢字 ☃ {}\t\n"
    assert tokenizer.detokenize(tokenizer.tokenize(unseen)) == unseen
    assert tokenizer.tokenize("ﬁne") == tokenizer.tokenize("fine") == tokenizer.tokenize(" fine")


def test_the_same_text_gives_the_same_bytes(tmp_path):
    outputs = []
    for parallelism in ("true", "false"):
        output = tmp_path / f"{parallelism}.json"
        subprocess.run(
            [
                sys.executable,
                "megatron/tokenizer/train_tokenizer.py",
                f"--json_input_dir={RECORDED / 'corpus_b.jsonl.gz'}",
                f"--tokenizer_output_path={output}",
                "-v=400",
            ],
            check=True,
            cwd=ROOT,
            env={"TOKENIZERS_PARALLELISM": parallelism},
            timeout=120,
        )
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]


def test_no_text_is_an_error_when_a_tokenizer_is_wanted(tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DatasetError, match=r"no text in .* \(1 files\)"):
        train(tmp_path, tmp_path / "tok.json")
    assert not (tmp_path / "tok.json").exists()


def test_a_vocabulary_without_room_for_bytes_is_refused(text_folder, tmp_path):
    with pytest.raises(ConfigError, match="vocabulary size 257 is too small: 256 bytes and 2"):
        train(text_folder, tmp_path / "tok.json", "-v", "257")
