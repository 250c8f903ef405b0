"""``tools/pythia.py``: commands for released Pythia checkpoints."""

import argparse
from collections.abc import Sequence

from megatron.cli.checkpoints.tool import run_tool
from megatron.cli.pythia.check import add_check
from megatron.cli.pythia.import_command import add_import

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (None: the process's own) names; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="pythia.py", description="Released Pythia checkpoints: check them, go on from them."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_check(commands)
    add_import(commands)
    options = parser.parse_args(argv)
    return run_tool("pythia.py", lambda: options.run(options))
