"""Join all datasets of a folder into one, in the order of their names.

Example:
    python tools/datasets/merge_datasets.py --input data/parts --output-prefix data/whole
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for use without an install

from megatron.base.errors import MegatronError
from megatron.data.joined_datasets import find_datasets, join_datasets


def main(input_args: Sequence[str] | None = None) -> None:
    """Run the tool with ``input_args``, or with the command line's.

    Raises:
        DatasetError: the datasets cannot be joined; nothing is written.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="folder of .bin and .idx files")
    parser.add_argument(
        "--output-prefix", type=Path, required=True, help="the new dataset, without .bin and .idx"
    )
    options = parser.parse_args(input_args)
    datasets = find_datasets(options.input)
    num_documents = join_datasets(datasets, options.output_prefix)
    print(f"{options.output_prefix}: {num_documents} documents of {len(datasets)} datasets")


if __name__ == "__main__":
    try:
        main()
    except MegatronError as error:
        sys.exit(f"error: {error}")
