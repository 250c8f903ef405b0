"""``neox-ledger diff RUN RUN``: where two runs part."""

import argparse
import dataclasses
from pathlib import Path

from megatron.cli.ledger.options import add_json_option
from megatron.cli.ledger.output import number, print_json, print_table, say
from megatron.ledger.queries.differences import Differences, compare_runs
from megatron.ledger.queries.run_view import open_run

EPILOG = """exit status:
  0  both read the same samples in the same steps, as far as both went
  1  they don't

examples:
  neox-ledger diff runs/a runs/b
  neox-ledger diff runs/a/global_step1000 runs/a      what a roll-back to 1000 left behind"""

_VALUE_WIDTH = 40


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("one", type=Path, metavar="RUN", help="a save directory or global_stepN")
    parser.add_argument("other", type=Path, metavar="RUN", help="another one")
    add_json_option(parser)


def run(options: argparse.Namespace) -> int:
    """Print what differs, the data first."""
    found = compare_runs(open_run(options.one), open_run(options.other))
    if options.json:
        print_json(dataclasses.asdict(found) | {"reads_the_same": found.reads_the_same})
    else:
        _print(found)
    return 0 if found.reads_the_same else 1


def _print(found: Differences) -> None:
    say(f"steps     {number(found.steps[0])} and {number(found.steps[1])}")
    if found.common_ancestor:
        say(f"related   steps 1..{number(found.common_ancestor)} were taken as one run")
    if found.samples_part_at is None:
        say(f"samples   the same in all steps 1..{number(min(found.steps))}")
    else:
        say(
            f"samples   others from step {number(found.samples_part_at)} on: "
            f"{'; '.join(found.reason)}"
        )
    if found.compared == 0:
        say("records   no step has a line in both")
    else:
        say(f"digests   {_parting(found.digests_part_at, found.compared)}")
        text = _parting(found.losses_part_at, found.compared)
        if found.losses_part_at is not None:
            text += f"; the largest difference is {found.largest_loss_difference:.3g}"
        say(f"losses    {text}")
    if found.config:
        say("", "configuration of the newest launches:")
        print_table(
            ["key", "one", "other"],
            [(key, _short(one), _short(other)) for key, (one, other) in found.config.items()],
        )


def _parting(step: int | None, compared: int) -> str:
    if step is None:
        return f"the same in all {number(compared)} steps that both recorded"
    return f"others from step {number(step)} on ({number(compared)} compared)"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _VALUE_WIDTH else text[: _VALUE_WIDTH - 3] + "..."
