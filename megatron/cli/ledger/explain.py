"""``neox-ledger explain CONFIG``: what a launch would go on from, consume, repeat and skip."""

import argparse
from pathlib import Path

from megatron.base.errors import CheckpointError, ConfigError
from megatron.cli.data_of_steps import read_config
from megatron.cli.ledger.options import add_json_option
from megatron.cli.ledger.output import note, print_json, say
from megatron.cli.resume_plan import plan_launch
from megatron.config.outcomes import check_launch
from megatron.ledger.planning.plan_json import plan_to_json
from megatron.ledger.planning.report import report_lines

EPILOG = """Nothing is started and no checkpoint is changed. Index maps that are needed to count
what a change costs are written beside the data, where the launch will use them.

exit status:
  0  the launch goes ahead
  1  it is refused
  2  what it would cost can't be told

examples:
  neox-ledger explain configs/125M.yml configs/local.yml
  neox-ledger explain my.yml --world-size 64           on a login node"""

REFUSED = 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="as for deepy.py")
    parser.add_argument("-d", "--conf_dir", type=Path, help="folder that the files are in")
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="ranks of the launch, where neither configuration nor this machine tell",
    )
    parser.add_argument(
        "--exact", action="store_true", help="count however many samples there are to compare"
    )
    add_json_option(parser)


def run(options: argparse.Namespace) -> int:
    """Plan as the launcher does, and print all of it."""
    folder = options.conf_dir or Path()
    try:
        config = read_config(
            [folder / path for path in options.configs], world_size=options.world_size
        )
        for notice in check_launch(config):
            note(f"note: {notice}")
        planned = plan_launch(config, counts_neox=True, is_unlimited=options.exact)
    except (ConfigError, CheckpointError) as error:  # the launcher would say the same
        note(f"neox-ledger explain: refused: {error}")
        return REFUSED
    if options.json:
        print_json(plan_to_json(planned.plan))
    else:
        say(*report_lines(planned.plan))
    return planned.plan.exit_status
