"""Count the tokens of datasets.

Example:
    python tools/datasets/dataset_token_count.py data/corpus_text_document data/more_text_document
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for use without an install

from megatron.base.errors import MegatronError
from megatron.stream.indexed_dataset import IndexedDataset


def main(input_args: Sequence[str] | None = None) -> None:
    """Run the tool with ``input_args``, or with the command line's.

    Raises:
        DatasetError: a dataset is missing or damaged.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefixes", nargs="+", help="datasets, without .bin and .idx")
    total = 0
    for prefix in parser.parse_args(input_args).prefixes:
        num_tokens = int(IndexedDataset(prefix).sizes.sum(dtype="int64"))
        print(f"{prefix}: {num_tokens} tokens")
        total += num_tokens
    print(f"total: {total} tokens")


if __name__ == "__main__":
    try:
        main()
    except MegatronError as error:
        sys.exit(f"error: {error}")
