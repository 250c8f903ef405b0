"""Tokenizers that go along with a model."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron.base.errors import CheckpointError, ConfigError
from megatron.checkpoint.hugging_face.hub_directory import has_file, hub_file
from megatron.data.tokenizers import Tokenizer, build_tokenizer

__all__ = ["TOKENIZER_JSON", "copy_from_hub", "copy_to_hub"]

TOKENIZER_JSON = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_FILES = (
    TOKENIZER_JSON,
    _TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def copy_from_hub(source: Path, directory: Path) -> Tokenizer | None:
    """Copy the tokenizer's files that ``source`` has; return the tokenizer if it can be opened.

    Raises:
        CheckpointError: a file can't be read, or isn't a tokenizer.
    """
    names = [name for name in _FILES if has_file(source, name)]
    if not names:
        return None
    directory.mkdir()
    for name in names:
        shutil.copyfile(hub_file(source, name), directory / name)
    if TOKENIZER_JSON not in names:
        return None
    try:
        return build_tokenizer("HFTokenizer", str(directory / TOKENIZER_JSON))
    except ConfigError as error:
        raise CheckpointError(f"{source / TOKENIZER_JSON} is no tokenizer: {error}") from error


def copy_to_hub(
    tokenizer_type: str, vocab_file: str | None, merge_file: str | None, directory: Path
) -> Iterator[str]:
    """Copy what a NeoX configuration names as its tokenizer, as transformers looks for it.

    Yields:
        What couldn't be done, and why.
    """
    kind = tokenizer_type.lower()
    if not vocab_file:
        yield "no tokenizer was copied: the configuration sets no vocab_file"
        return
    copies = {}
    if kind == "hftokenizer":
        copies = {TOKENIZER_JSON: vocab_file}
    elif kind in ("gpt2bpetokenizer", "hfgpt2tokenizer") and merge_file:
        copies = {"vocab.json": vocab_file, "merges.txt": merge_file}
    elif kind == "spmtokenizer":
        copies = {"tokenizer.model": vocab_file}
    if not copies:
        yield f"no tokenizer was copied: transformers has none of the form of {tokenizer_type}"
        return
    missing = [file for file in copies.values() if not (file and Path(file).is_file())]
    if missing:
        yield f"no tokenizer was copied: {', '.join(map(str, missing))} of its files aren't here"
        return
    for name, file in copies.items():
        shutil.copyfile(str(file), directory / name)
    beside = Path(str(vocab_file)).parent
    if TOKENIZER_JSON in copies:
        if Path(str(vocab_file)).name == TOKENIZER_JSON and (beside / _TOKENIZER_CONFIG).is_file():
            shutil.copyfile(beside / _TOKENIZER_CONFIG, directory / _TOKENIZER_CONFIG)
        else:
            _write_tokenizer_config(directory, build_tokenizer(kind, vocab_file))


def _write_tokenizer_config(directory: Path, tokenizer: Tokenizer) -> None:
    end = None if tokenizer.eod is None else tokenizer.inv_vocab[tokenizer.eod]
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if end is not None:
        config |= {"bos_token": end, "eos_token": end, "unk_token": end}
    (directory / _TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
