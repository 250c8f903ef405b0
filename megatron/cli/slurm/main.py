"""``neox-slurm COMMAND``: turns errors into messages and an exit status."""

import argparse
import sys
from collections.abc import Sequence

from megatron.base.errors import MegatronError
from megatron.cli.slurm import decide

__all__ = ["CANNOT_TELL", "main"]

CANNOT_TELL = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (None: the process's own) names; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="neox-slurm", description="For batch scripts: how a job goes on after a launch."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "decide",
        help="is the job done, shall it be requeued, or does it stop?",
        description="Decide from a launch's exit status and its run's record how the job goes on.",
        epilog=decide.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    decide.add_options(command)
    options = parser.parse_args(argv)
    try:
        return decide.run(options)
    except (MegatronError, OSError) as error:
        print(f"neox-slurm: {error}", file=sys.stderr)  # noqa: T201 - the message
        return CANNOT_TELL
    except KeyboardInterrupt:
        return 130
