"""Options that several commands share."""

import argparse
import re
from pathlib import Path

from megatron.ledger.queries.run_view import RunView, open_run

__all__ = [
    "add_data_option",
    "add_json_option",
    "add_run_option",
    "add_source_options",
    "add_stream_option",
    "opened_run",
    "step_number",
    "step_range",
]


def add_run_option(parser: argparse.ArgumentParser) -> None:
    """Add which run is asked."""
    parser.add_argument(
        "--run",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="a run's save directory (the newest lineage), or one global_stepN, also a copied one; "
        "default: the working directory",
    )


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add whose steps are asked about: those of a configuration or of a run."""
    parser.add_argument(
        "configs", nargs="*", type=Path, metavar="CONFIG", help="as for deepy.py; or else --run"
    )
    parser.add_argument(
        "--run", type=Path, metavar="DIR", help="a run's save directory, or one global_stepN"
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="ranks of the launch, where neither configuration nor this machine tell",
    )


def add_stream_option(parser: argparse.ArgumentParser) -> None:
    """Add which stream is meant."""
    parser.add_argument(
        "--stream",
        choices=("train", "valid", "test"),
        default="train",
        help="of valid and test, steps are evaluations, counted from 1 (default: train)",
    )


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Add where datasets lie now."""
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="PREFIX",
        help="a dataset, or a label dataset, that was moved, by its path without .bin and .idx; it "
        "is recognised by its content. May be repeated",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add the choice of JSON."""
    parser.add_argument("--json", action="store_true", help="print JSON, see docs/ledger/")


def opened_run(options: argparse.Namespace) -> RunView:
    """Open the run that ``--run`` names."""
    return open_run(options.run)


def step_number(text: str) -> int:
    """Read one step; for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no step; they count from 1")
    return int(text)


def step_range(text: str) -> range:
    """Read ``A..B`` (inclusive) or a single step; for argparse."""
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor a range such as 10..20")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(f"{text!r}: steps count from 1, and ranges ascend")
    return range(first, last + 1)
