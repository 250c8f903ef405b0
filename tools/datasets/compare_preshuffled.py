"""Compare what steps read with the rows of a preshuffled copy: position p with row p.

The proof that tokenised data with its index maps gives the order of a preshuffled set. Only the
shards that the steps read have to be there; `neox-ledger shards required-for` lists them.

Examples:
    python tools/datasets/compare_preshuffled.py 1..50 pile-standard-pythia-preshuffled/document \\
        configs/pythia/160M.yml --world-size 32
    python tools/datasets/compare_preshuffled.py 1000 rows/document --run runs/pythia

Exit status: 0 all rows are equal, 1 some differ, 2 they can't be compared.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for use without an install

from megatron.base.errors import ConfigError, MegatronError
from megatron.cli.data_of_steps import StepData, data_of_config, data_of_run, read_config
from megatron.cli.ledger.options import add_data_option, step_range
from megatron.cli.ledger.progress import progress
from megatron.ledger.queries.row_comparison import compare_rows
from megatron.ledger.queries.run_view import open_run
from megatron.stream.indexed_dataset import IndexedDataset

CANNOT_COMPARE = 2

_NAMED = 10  # rows


def main(input_args: Sequence[str] | None = None) -> int:
    """Compare, print the first rows that differ, and return the exit status.

    Raises:
        MegatronError: data or configuration cannot be used.
    """
    options = _parser().parse_args(input_args)
    source = _opened(options)
    pieces = list(source.steps("train").pieces(options.steps))
    total = sum(len(piece.positions) for piece in pieces)
    count = 0
    with progress("samples") as on_progress:
        for difference in compare_rows(
            pieces,
            source.opened("train"),
            IndexedDataset(options.rows),
            first_row=options.first_row,
            on_samples=lambda done: on_progress(done, total),
        ):
            count += 1
            if count <= _NAMED:
                print(difference)
    if count > _NAMED:
        print(f"and {count - _NAMED} more")
    print(
        f"steps {options.steps.start}..{options.steps.stop - 1}: {total - count} of {total} "
        f"samples are the rows of their positions in {options.rows}"
    )
    return 1 if count else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", type=step_range, metavar="A..B", help="steps, both included")
    parser.add_argument("rows", metavar="ROWS", help="preshuffled set, without .bin and .idx")
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG", help="or else --run")
    parser.add_argument("--run", type=Path, metavar="DIR", help="save directory or global_stepN")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks of the launch")
    parser.add_argument("--first-row", type=int, default=0, metavar="N", help="row of position 0")
    add_data_option(parser)
    return parser


def _opened(options: argparse.Namespace) -> StepData:
    if bool(options.configs) == (options.run is not None):
        raise ConfigError("name either configuration files or --run")
    if options.run is not None:
        return data_of_run(open_run(options.run), options.data)
    config = read_config(options.configs, world_size=options.world_size)
    return data_of_config(
        config, options.data, on_note=lambda text: print(f"note: {text}", file=sys.stderr)
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (MegatronError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(CANNOT_COMPARE)
