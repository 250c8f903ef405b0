"""Train a byte-level BPE tokenizer on text files: `python megatron/tokenizer/train_tokenizer.py`.

The same files and vocabulary size give the same tokenizer, byte for byte. Its vocabulary holds all
256 bytes, so every text survives tokenizing (after NFKC normalisation) unchanged.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for use without an install

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import ConfigError, DatasetError
from megatron.base.printing import print_rank_0
from megatron.data.text_files import find_text_files, iterate_documents
from megatron.data.tokenizers import END_OF_DOCUMENT, NUM_BYTES, PADDING

__all__ = ["main", "parse_args", "train_byte_level_bpe"]

_SPECIAL_TOKENS = (END_OF_DOCUMENT, PADDING)  # ids 0 and 1
_SMALLEST_VOCABULARY = NUM_BYTES + len(_SPECIAL_TOKENS)


def train_byte_level_bpe(documents: Iterator[str], vocab_size: int) -> str:
    """Return a `tokenizers` JSON trained on ``documents``.

    Args:
        documents: texts, each consumed once.
        vocab_size: ids at most, special tokens included; a small corpus gives fewer.

    Raises:
        ConfigError: ``vocab_size`` has no room for the 256 bytes and the special tokens.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocabulary size {vocab_size} is too small: {NUM_BYTES} bytes and "
            f"{len(_SPECIAL_TOKENS)} special tokens need {_SMALLEST_VOCABULARY}"
        )
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer.to_str(pretty=True)


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of ``input_args``, or of the command line."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level BPE tokenizer and save it as a `tokenizers` JSON file.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json_input_dir",
        required=True,
        help="folder of .jsonl files whose objects have a 'text' (also .txt, .gz, .zst), or a file",
    )
    parser.add_argument(
        "--tokenizer_output_path",
        required=True,
        help="file to write, e.g. tokenizer.json; empty: train, but write nothing",
    )
    parser.add_argument(
        "--tokenizer_type", type=str.upper, choices=("BPE",), default="BPE", help="BPE"
    )
    parser.add_argument(
        "-v", "--vocab_size", type=int, default=52000, help="ids at most (default: %(default)s)"
    )
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    """Train as ``args`` (from :func:`parse_args`) say, and save the tokenizer if they name a file.

    Without an output file it is a trial run, which reports a missing corpus instead of failing.

    Raises:
        DatasetError: there is no text to train on, or it cannot be read.
        ConfigError: the vocabulary is too small.
    """
    try:
        trained = _train_on(Path(args.json_input_dir), args.vocab_size)
    except DatasetError as error:
        if args.tokenizer_output_path:
            raise
        print_rank_0(f"nothing to train on: {error}")
        return
    if args.tokenizer_output_path:
        output = Path(args.tokenizer_output_path)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, trained)
        print_rank_0(f"tokenizer saved to {output}")


def _train_on(text_path: Path, vocab_size: int) -> str:
    files = find_text_files([text_path])
    num_documents = 0

    def documents() -> Iterator[str]:
        nonlocal num_documents
        for (text,) in iterate_documents(files):
            num_documents += 1
            yield text

    trained = train_byte_level_bpe(documents(), vocab_size)
    if num_documents == 0:
        raise DatasetError(f"no text in {text_path} ({len(files)} files)")
    print_rank_0(f"trained on {num_documents} documents of {len(files)} files")
    return trained


if __name__ == "__main__":
    main(parse_args())
