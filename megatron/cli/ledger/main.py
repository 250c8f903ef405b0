"""``neox-ledger COMMAND``: finds the command, and turns errors into messages and an exit status."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from megatron.base.errors import MegatronError

__all__ = ["CANNOT_TELL", "COMMANDS", "main"]

CANNOT_TELL = 2  # exit status when a question could not be answered

COMMANDS = {
    "explain": "what a launch would go on from, consume, repeat and skip",
    "step": "the samples of a step: documents, files and bytes, ranks and rows",
    "document": "every step that consumed a document",
    "shard": "every step that consumed a part of a token file",
    "bytes": "every step that consumed a range of bytes",
    "shards": "the token files that steps need, and index maps without any",
    "verify": "compare what was recorded with the plan and with the data",
    "export": "write the tokens, documents and positions of steps",
    "diff": "where two runs part",
    "log": "the attempts of a run, and what they left",
}
_MODULES = {"shard": "byte_range", "bytes": "byte_range"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with ``argv`` (None: the process's own) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    name = arguments[0] if arguments else None
    if name not in COMMANDS:
        parser.parse_args(arguments)  # --help, or an error that lists the commands
        parser.print_help()
        return CANNOT_TELL
    # Only the command's own module is loaded: it decides what the start costs.
    command = importlib.import_module(f"megatron.cli.ledger.{_MODULES.get(name, name)}")
    own = argparse.ArgumentParser(
        prog=f"neox-ledger {name}",
        description=COMMANDS[name].capitalize() + ".",
        epilog=command.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_options(own)
    options = own.parse_args(arguments[1:])
    options.command = name
    try:
        return int(command.run(options))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MegatronError, OSError) as error:
        print(f"neox-ledger {name}: {error}", file=sys.stderr)  # noqa: T201 - the message
        return CANNOT_TELL
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="neox-ledger",
        description="Ask a run what it trained on, and what a launch would do.",
        epilog=f"commands:\n{lines}\n\nneox-ledger COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="neox-ledger COMMAND ...",
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="see below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
