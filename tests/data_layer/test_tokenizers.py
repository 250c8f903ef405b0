"""The six tokenizer types: ids, sizes, end of document, round trips, and what is refused."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.errors import ConfigError
from megatron.data.tokenizers import TOKENIZER_TYPES, build_tokenizer, padded_vocab_size
from megatron.tokenizer import build_tokenizer as build_as_neox
from tests.data_layer.corpus import TOKENIZER_JSON

TEXT = "the  cat's song,\n\n 12345 Ünïcode 漢字 ☃<|endoftext|> it's over"


@pytest.fixture(scope="module")
def gpt2_directory(tmp_path_factory):
    from tokenizers import ByteLevelBPETokenizer

    directory = tmp_path_factory.mktemp("gpt2")
    trained = ByteLevelBPETokenizer()
    corpus = ["the cat's song is over, it's 12345 times the same song"] * 3
    trained.train_from_iterator(corpus, vocab_size=300, special_tokens=["<|endoftext|>"])
    trained.save_model(str(directory))
    return directory


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    import sentencepiece

    def train(**extra):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat"] * 20),
            model_writer=model,
            vocab_size=20,
            model_type="bpe",
            normalization_rule_name="identity",
            minloglevel=2,
            **extra,
        )
        return model.getvalue()

    directory = tmp_path_factory.mktemp("spm")
    (directory / "with_end.model").write_bytes(train(user_defined_symbols=["<|endoftext|>"]))
    (directory / "without_end.model").write_bytes(train())
    return directory / "with_end.model"


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_json_tokenizer_gives_the_recorded_ids():
    tokenizer = build_tokenizer("HFTokenizer", str(TOKENIZER_JSON))
    assert (tokenizer.vocab_size, tokenizer.eod) == (300, 0)
    assert tokenizer.tokenize("the cat <|endoftext|>") == [295, 70, 222, 68, 260, 222, 0]
    assert tokenizer.vocab["<|padding|>"] == 1
    assert tokenizer.inv_vocab[1] == "<|padding|>"


@pytest.mark.parametrize("tokenizer_type", ["hftokenizer", "HFTOKENIZER", "HFTokenizer"])
def test_type_names_ignore_case(tokenizer_type):
    assert build_tokenizer(tokenizer_type, str(TOKENIZER_JSON)).vocab_size == 300


def test_gpt2_from_files_equals_hugging_faces_gpt2_tokenizer(gpt2_directory):
    ours = build_tokenizer(
        "GPT2BPETokenizer", str(gpt2_directory / "vocab.json"), str(gpt2_directory / "merges.txt")
    )
    theirs = build_tokenizer("HFGPT2Tokenizer", str(gpt2_directory))
    assert ours.tokenize(TEXT) == theirs.tokenize(TEXT)
    assert ours.eod == theirs.eod == 0
    assert theirs.vocab_size == ours.vocab_size + 1, "NeoX adds <|padding|> to this type only"
    assert theirs.vocab["<|padding|>"] == ours.vocab_size


def test_sentencepiece_ends_documents_with_its_end_piece(sentencepiece_model):
    tokenizer = build_tokenizer("SPMTokenizer", str(sentencepiece_model))
    assert tokenizer.vocab_size == 20
    assert tokenizer.inv_vocab[tokenizer.eod] == "<|endoftext|>"


def test_sentencepiece_without_an_end_piece_says_that_unknown_stands_in(
    sentencepiece_model, caplog
):
    path = sentencepiece_model.with_name("without_end.model")
    with caplog.at_level(logging.WARNING):
        tokenizer = build_tokenizer("SPMTokenizer", str(path))
    assert tokenizer.eod == tokenizer.vocab["<unk>"]
    assert f"{path} has no piece <|endoftext|>" in caplog.text


def test_character_level_ids_are_utf8_bytes():
    tokenizer = build_tokenizer("CharLevelTokenizer", None)
    assert (tokenizer.vocab_size, tokenizer.eod) == (512, 0)
    assert tokenizer.tokenize("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.detokenize([104, 105, 5]) == "hi "


TIKTOKEN_PLUGIN = """
def tiny():
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks[b"th"] = 256
    return {"name": "tiny", "pat_str": r"\\S+|\\s+", "mergeable_ranks": ranks,
            "special_tokens": {"<|endoftext|>": 257}, "explicit_n_vocab": 258}

ENCODING_CONSTRUCTORS = {"tiny": tiny}
"""


def test_tiktoken_encodings_are_found_by_name(tmp_path):
    (tmp_path / "tiktoken_ext").mkdir()
    (tmp_path / "tiktoken_ext" / "tiny_plugin.py").write_text(TIKTOKEN_PLUGIN)
    done = run_python(
        "from megatron.data.tokenizers import build_tokenizer\n"
        "t = build_tokenizer('TiktokenTokenizer', 'tiny')\n"
        "ids = t.tokenize('the <|endoftext|>')\n"
        "assert t.detokenize(ids) == 'the <|endoftext|>' and t.eod not in ids\n"
        "assert t.tokenize_batch(['the']) == [t.tokenize('the')]\n"
        "print(t.vocab_size, t.eod, ids[0])",
        PYTHONPATH=str(tmp_path),
    )
    assert done.stdout.split() == ["258", "257", "256"], done.stderr


def test_tiktoken_without_a_network_says_what_to_do(tmp_path):
    done = run_python(
        "from megatron.data.tokenizers import build_tokenizer\n"
        "build_tokenizer('TiktokenTokenizer', 'cl100k_base')",
        HTTPS_PROXY="http://127.0.0.1:9",
        TIKTOKEN_CACHE_DIR=str(tmp_path),
    )
    assert done.returncode == 1
    assert "vocab_file='cl100k_base' is downloaded on first use" in done.stderr
    assert "name it in TIKTOKEN_CACHE_DIR" in done.stderr


def test_gpt2_from_the_hub_without_a_network_is_refused_not_empty():
    done = run_python(
        "from megatron.data.tokenizers import build_tokenizer\n"
        "build_tokenizer('HFGPT2Tokenizer', None)",
        HF_HUB_OFFLINE="1",
        HF_HOME="/nonexistent",
    )
    assert done.returncode == 1
    assert "no tokenizer found for vocab_file='gpt2'" in done.stderr


def test_tokenizers_need_no_torch():
    done = run_python(
        "import sys\n"
        "from megatron.data.tokenizers import build_tokenizer\n"
        f"build_tokenizer('HFTokenizer', {str(TOKENIZER_JSON)!r}).tokenize('the cat')\n"
        "print('torch' in sys.modules)"
    )
    assert done.stdout.strip() == "False", done.stderr


@given(st.text(max_size=40))
def test_byte_level_tokenizers_keep_text_and_batches_equal_single_texts(gpt2_directory, text):
    tokenizer = build_tokenizer(
        "GPT2BPETokenizer", str(gpt2_directory / "vocab.json"), str(gpt2_directory / "merges.txt")
    )
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert tokenizer.tokenize_batch([text, "a"]) == [ids, tokenizer.tokenize("a")]


@pytest.mark.parametrize(
    ("tokenizer_type", "vocab_file", "merge_file", "message"),
    [
        ("BertTokenizer", None, None, r"tokenizer_type='BertTokenizer' is not known; choose one"),
        ("HFTokenizer", None, None, r"HFTokenizer needs vocab_file, which is not set"),
        ("HFTokenizer", "no/tok.json", None, r"vocab_file='no/tok.json' is not a file"),
        ("SPMTokenizer", "no.model", None, r"vocab_file='no.model' is not a file"),
        ("GPT2BPETokenizer", __file__, None, r"GPT2BPETokenizer needs merge_file, which is not"),
        ("GPT2BPETokenizer", __file__, "no.txt", r"merge_file='no.txt' is not a file"),
        ("GPT2BPETokenizer", __file__, __file__, r"cannot read vocab_file and merge_file"),
        ("HFTokenizer", __file__, None, r"cannot read vocab_file .*test_tokenizers.py"),
        ("SPMTokenizer", __file__, None, r"cannot read vocab_file .*test_tokenizers.py"),
        ("HFGPT2Tokenizer", str(Path(__file__).parent), None, r"neither tokenizer.json nor vocab"),
        ("TiktokenTokenizer", None, None, r"needs vocab_file: the name of an encoding, one of"),
        ("TiktokenTokenizer", "gpt9", None, r"vocab_file='gpt9' names no encoding; choose one"),
    ],
)
def test_what_cannot_be_built_is_refused(tokenizer_type, vocab_file, merge_file, message):
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(tokenizer_type, vocab_file, merge_file)


def test_a_missing_library_is_named(monkeypatch, sentencepiece_model):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match="needs the package sentencepiece: `pip install"):
        build_tokenizer("SPMTokenizer", str(sentencepiece_model))


@given(st.integers(1, 300_000), st.integers(1, 1000), st.integers(1, 64))
def test_padded_vocabulary_is_the_smallest_multiple_that_holds_it(vocab_size, divisible_by, size):
    padded = padded_vocab_size(vocab_size, divisible_by, size)
    assert padded % (divisible_by * size) == 0
    assert 0 <= padded - vocab_size < divisible_by * size


@pytest.mark.parametrize(("size", "padded"), [(1, 50304), (2, 50432), (4, 50688)])
def test_pythia_vocabularies(size, padded):
    assert padded_vocab_size(50277, 128, size) == padded


def test_padding_refuses_nonsense():
    with pytest.raises(ValueError, match="must be positive, got 0, 128, 1"):
        padded_vocab_size(0, 128, 1)


def test_neox_face_sets_the_padded_size(capsys):
    options = SimpleNamespace(
        tokenizer_type="HFTokenizer",
        vocab_file=str(TOKENIZER_JSON),
        merge_file=None,
        rank=0,
        make_vocab_size_divisible_by=128,
        model_parallel_size=2,
    )
    assert build_as_neox(options).vocab_size == 300
    assert options.padded_vocab_size == 512
    assert "300 tokens, padded to 512" in capsys.readouterr().out


def test_all_six_types_of_neox_are_known():
    assert len(TOKENIZER_TYPES) == 6
