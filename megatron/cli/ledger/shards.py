"""``neox-ledger shards``: which token files steps read, and index maps without them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.base.errors import ConfigError
from megatron.cli.data_of_steps import StepData, data_of_config, data_of_run, read_config
from megatron.cli.ledger.options import (
    add_data_option,
    add_json_option,
    add_source_options,
    add_stream_option,
    step_range,
)
from megatron.cli.ledger.output import (
    common_directory,
    counted,
    note,
    number,
    print_json,
    print_table,
    say,
)
from megatron.cli.ledger.progress import progress
from megatron.ledger.queries.required import RequiredFile, required_by_steps
from megatron.ledger.queries.run_view import open_run
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.sequential_order import has_rows_alone
from megatron.stream.shard_layout import assumed_shards
from megatron.stream.token_bytes import TokenBytes

EPILOG = """Only the .idx of a dataset is needed. Where no token file is there at all, files are
taken to be cut as Pythia's are; say otherwise with --shard-bytes. Index maps that are missing are
written beside the .idx, under the names that a launch looks for.

exit status of required-for:
  0  all files are there
  1  some are missing

examples:
  neox-ledger shards required-for 3001..3100 configs/pythia/160M-deduped.yml --world-size 32
  neox-ledger shards required-for 1..500 my.yml --missing --names       what to download
  neox-ledger shards required-for 1000 --run runs/pythia --ranges --json
  neox-ledger shards maps configs/pythia/160M-deduped.yml --world-size 32"""

MISSING = 1

_PYTHIA_BYTES = 5_000_000_000
_PRESHUFFLED_BYTES = 30_000_000_000  # of files with one document per sample


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the commands and their options."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    files = commands.add_parser("required-for", help="the token files that steps read")
    files.add_argument("steps", type=step_range, metavar="A..B", help="steps, both included")
    add_source_options(files)
    add_stream_option(files)
    files.add_argument(
        "--shard-bytes",
        type=int,
        metavar="N",
        help="of every file but the last, where none is there (default: 5,000,000,000; "
        "30,000,000,000 if every document is a sample)",
    )
    files.add_argument("--ranges", action="store_true", help="list the bytes too, with --json")
    files.add_argument("--missing", action="store_true", help="only files that aren't there")
    files.add_argument("--names", action="store_true", help="print names alone, one a line")
    add_data_option(files)
    add_json_option(files)
    maps = commands.add_parser("maps", help="write the index maps of a configuration's streams")
    add_source_options(maps)
    add_data_option(maps)


def run(options: argparse.Namespace) -> int:
    """Run one of the commands."""
    source = _opened(options)
    return _write_maps(source) if options.what == "maps" else _required_for(options, source)


def _opened(options: argparse.Namespace) -> StepData:
    if options.configs and options.run is None:
        config = read_config(options.configs, world_size=options.world_size)
        return data_of_config(config, options.data, on_note=lambda text: note(f"note: {text}"))
    if options.configs:
        raise ConfigError("name configuration files or --run, not both")
    return data_of_run(open_run(options.run or Path()), options.data)


def _write_maps(source: StepData) -> int:
    for name, steps in source.streams.items():
        opened = source.opened(name)
        for order in steps.orders.values():
            stream = opened(order)
            say(f"{name}: {counted(len(stream), 'sample')} before the first tail block")
    return 0


def _required_for(options: argparse.Namespace, source: StepData) -> int:
    pieces = list(source.steps(options.stream).pieces(options.steps))
    total = sum(len(piece.positions) for piece in pieces)
    with progress("samples") as on_progress:
        found = required_by_steps(
            pieces,
            source.opened(options.stream),
            _files(options.shard_bytes, pieces[0].order.seq_length),
            with_ranges=options.ranges,
            on_samples=lambda done: on_progress(done, total),
        )
    missing = sum(not one.shard.is_there for one in found)
    shown = [one for one in found if not (options.missing and one.shard.is_there)]
    if options.json:
        print_json(_as_json(options, total, shown))
    elif options.names:
        for one in shown:
            say(one.shard.path.name)
    else:
        _print(options, total, found, shown)
    return MISSING if missing else 0


def _files(shard_bytes: int | None, seq_length: int) -> Callable[[IndexedDataset], TokenBytes]:
    """Return what tells the files of a dataset, also if none of them is there."""
    assumed: dict[str, TokenBytes] = {}

    def files(dataset: IndexedDataset) -> TokenBytes:
        tokens, prefix = dataset.tokens, dataset.prefix
        if len(tokens.missing) < len(tokens.shards):
            return tokens
        if prefix not in assumed:
            is_preshuffled = has_rows_alone(dataset, seq_length)
            size = shard_bytes or (_PRESHUFFLED_BYTES if is_preshuffled else _PYTHIA_BYTES)
            assumed[prefix] = TokenBytes(assumed_shards(prefix, tokens.size, size))
            note(
                f"note: no token file of {prefix} is there; taken to be cut into "
                f"{counted(len(assumed[prefix].shards), 'file')} of {number(size)} bytes"
            )
        return assumed[prefix]

    return files


def _print(
    options: argparse.Namespace,
    total: int,
    found: list[RequiredFile],
    shown: list[RequiredFile],
) -> None:
    steps = options.steps
    missing = sum(not one.shard.is_there for one in found)
    say(
        f"steps {steps.start}..{steps.stop - 1} of the {options.stream} stream, "
        f"{counted(total, 'sample')}: {counted(len(found), 'file')}, {missing} of them missing; "
        f"{number(sum(one.num_bytes for one in found))} bytes are read"
    )
    folder = common_directory(one.shard.path for one in shown)
    if folder is not None:
        say("", f"files in {folder}", "")
    headings = ["file", "", "size>", "samples>", "bytes read>", "first>", "last>", "from>", "to>"]
    print_table(
        headings,
        [
            [
                one.shard.path if folder is None else one.shard.path.name,
                "" if one.shard.is_there else "missing",
                number(one.shard.stop - one.shard.start),
                *(number(value) for value in (one.samples, one.num_bytes)),
                *(number(value) for value in (one.first_step, one.last_step)),
                *(number(value) for value in (one.start, one.stop)),
            ]
            for one in shown
        ],
    )


def _as_json(options: argparse.Namespace, total: int, shown: list[RequiredFile]) -> dict[str, Any]:
    return {
        "stream": options.stream,
        "steps": [options.steps.start, options.steps.stop - 1],
        "samples": total,
        "files": [
            {
                "file": str(one.shard.path),
                "is_there": one.shard.is_there,
                "size": one.shard.stop - one.shard.start,
                "samples": one.samples,
                "bytes_read": one.num_bytes,
                "first_step": one.first_step,
                "last_step": one.last_step,
                "bytes": [one.start, one.stop],
                **({} if one.ranges is None else {"ranges": [list(pair) for pair in one.ranges]}),
            }
            for one in shown
        ],
    }
