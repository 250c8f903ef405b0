"""Download a corpus and tokenize it: `python prepare_data.py enwik8 -d data`."""

import argparse
import sys
from collections.abc import Sequence

from megatron.base.errors import MegatronError
from megatron.data.tokenizers import TOKENIZER_TYPES
from tools.datasets.corpora import CORPORA, prepare_dataset


def main(input_args: Sequence[str] | None = None) -> None:
    """Run the command with ``input_args``, or with the command line's.

    Raises:
        MegatronError: the corpus cannot be downloaded or tokenized.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "dataset", nargs="?", default="enwik8", help=f"one of {', '.join(CORPORA)}; default enwik8"
    )
    parser.add_argument(
        "-t", "--tokenizer", default="GPT2BPETokenizer", help=", ".join(TOKENIZER_TYPES)
    )
    parser.add_argument("-d", "--data-dir", help="default: $DATA_DIR, else ./data")
    parser.add_argument("-v", "--vocab-file", help="default: GPT-2's, for GPT2BPETokenizer")
    parser.add_argument("-m", "--merge-file", help="default: GPT-2's, for GPT2BPETokenizer")
    parser.add_argument("-f", "--force-redownload", action="store_true")
    options = parser.parse_args(input_args)
    prefix = prepare_dataset(
        options.dataset,
        options.tokenizer,
        options.data_dir,
        options.vocab_file,
        options.merge_file,
        options.force_redownload,
    )
    print(f"data_path: {prefix}")  # noqa: T201 - a command line prints


if __name__ == "__main__":
    try:
        main()
    except MegatronError as error:
        sys.exit(f"error: {error}")
