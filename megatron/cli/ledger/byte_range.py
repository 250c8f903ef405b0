"""``neox-ledger shard F`` and ``bytes F:A-B``: every step that consumed a part of a token file."""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from megatron.base.errors import DatasetError
from megatron.cli.ledger.consumers import (
    Question,
    add_consumer_options,
    opened_question,
    print_consumers,
    print_totals,
)
from megatron.ledger.queries.consumers import ShardBytes, consumers_of_bytes, find_shard

EPILOG = """A file is one .bin of a dataset, whole or one of its shards. Byte ranges are half-open.

examples:
  neox-ledger shard pile-00007-of-00020.bin --run runs/pythia     how much each step read of it
  neox-ledger bytes pile-00007-of-00020.bin:4096-8192 --run runs/pythia"""


class _FileRange(NamedTuple):
    file: Path
    start: int
    stop: int | None  # None: to the end


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of either command."""
    is_range = parser.prog.endswith("bytes")
    parser.add_argument(
        "file",
        type=_file_range if is_range else _whole_file,
        metavar="F:A-B" if is_range else "F",
        help="the .bin file" + (" and its bytes A to before B" if is_range else ""),
    )
    add_consumer_options(parser)


def run(options: argparse.Namespace) -> int:
    """List the steps."""
    question = opened_question(options)
    asked: _FileRange = options.file
    wanted = _locate(question, asked)
    found = question.ask(lambda course: consumers_of_bytes(course, question.data, wanted))
    values = {
        "file": str(asked.file),
        "bytes": [asked.start, asked.start + wanted.stop - wanted.start],
        "stream": options.stream,
    }
    if options.command == "shard":
        print_totals(question, found, values, as_json=options.json, what=str(asked.file))
    else:
        what = f"bytes {asked.start}..{asked.stop} of {asked.file}"
        print_consumers(question, found, values, as_json=options.json, what=what)
    return 0


def _locate(question: Question, asked: _FileRange) -> ShardBytes:
    shard = find_shard(question.datasets, question.data, asked.file)
    if asked.stop is None:
        return shard
    if shard.start + asked.stop > shard.stop:
        raise DatasetError(
            f"{asked.file} has {shard.stop - shard.start} bytes; {asked.start}-{asked.stop} go "
            "beyond its end"
        )
    return ShardBytes(shard.identity, shard.start + asked.start, shard.start + asked.stop)


def _whole_file(text: str) -> _FileRange:
    return _FileRange(Path(text), 0, None)


def _file_range(text: str) -> _FileRange:
    match = re.fullmatch(r"(.+):(\d+)-(\d+)", text)
    if match is None or int(match[2]) >= int(match[3]):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form FILE:FIRST-STOP")
    return _FileRange(Path(match[1]), int(match[2]), int(match[3]))
