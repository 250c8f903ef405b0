"""``tools/ckpts/verify.py DIR``: is a checkpoint good?"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron.base.errors import CheckpointError
from megatron.base.printing import printable
from megatron.checkpoint.neighbours import Fingerprint, fingerprint, likenesses
from megatron.checkpoint.optimizer_structure import NO_OPTIMIZER_FILE
from megatron.checkpoint.verification import Verdict, verify_checkpoint
from megatron.cli.checkpoints.found import Found, find_checkpoints
from megatron.cli.checkpoints.tool import CANNOT_TELL, run_tool
from megatron.cli.ledger.options import add_json_option
from megatron.cli.ledger.output import counted, number, print_json, say
from megatron.cli.ledger.progress import progress
from megatron.ledger.readers import reading

__all__ = ["main"]

GOOD, BAD = 0, 1
_NAMED = 20  # problems of one checkpoint that are printed

_EPILOG = """What is checked: every file is there, holds data alone (nothing in it is run), and has
the digest that the manifest says, or without a manifest the checksums that torch's files carry;
shapes agree with the stored arguments, with the other ranks and with the optimizer; everything is
of one step, the one the directory is called after; no value is NaN or infinite; weights are the
optimizer's copies, rounded. No GPU is needed and nothing is changed.

exit status:
  0  good
  1  something is wrong; each problem names its file
  2  nothing is wrong, but something could not be checked

examples:
  python tools/ckpts/verify.py runs/pythia                     every checkpoint of a run
  python tools/ckpts/verify.py runs/pythia/global_step1000
  python tools/ckpts/verify.py --deep runs/pythia              are two steps the same weights?
  python tools/ckpts/verify.py --weights-only downloads/pythia-1b/global_step143000"""


def main(argv: Sequence[str] | None = None) -> int:
    """Verify what ``argv`` (None: the process's own) names and return the exit status."""
    options = _parser().parse_args(argv)
    return run_tool("verify", lambda: _verify(options))


def _verify(options: argparse.Namespace) -> int:
    found = find_checkpoints(options.directory)
    verdicts = _verified(found, needs_optimizer=not options.weights_only)
    together = _compared(verdicts) if options.deep else ([], [])
    problems, unknown = [*found.problems, *together[0]], together[1]
    status = GOOD
    if unknown or any(verdict.unknown for verdict in verdicts):
        status = CANNOT_TELL
    if problems or any(verdict.problems for verdict in verdicts):
        status = BAD
    if options.json:
        print_json(
            {
                "exit_status": status,
                "problems": problems,
                "unknown": unknown,
                "notes": found.notes,
                "checkpoints": [_as_json(verdict) for verdict in verdicts],
            }
        )
        return status
    for verdict in verdicts:
        _print(verdict)
    _print_lines(found.notes, problems, unknown, indent="")
    say(_result(verdicts, problems, status))
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="verify.py",
        description="Check checkpoints, NeoX's or ours: is all of it there, and undamaged?",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="a global_stepN, or a save directory: every checkpoint in it",
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="also compare each checkpoint with the next: weights and moments of different steps "
        "must differ",
    )
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="the checkpoint was published without optimizer state; don't miss it",
    )
    add_json_option(parser)
    return parser


def _verified(found: Found, *, needs_optimizer: bool) -> list[Verdict]:
    verdicts = []
    for checkpoint in found.checkpoints:
        with progress(f"files of {checkpoint.name}") as on_file, reading(checkpoint):
            verdict = verify_checkpoint(
                checkpoint, needs_optimizer=needs_optimizer, on_file=on_file
            )
        if any(NO_OPTIMIZER_FILE in problem for problem in verdict.problems):
            verdict.notes.append(
                "--weights-only doesn't miss an optimizer: for a checkpoint of weights alone, such "
                "as reshape.py --for-neox or a publisher's"
            )
        verdicts.append(verdict)
    return verdicts


def _compared(verdicts: Sequence[Verdict]) -> tuple[list[str], list[str]]:
    """Compare each checkpoint with the next; only their digests are in memory."""
    problems: list[str] = []
    unknown: list[str] = []
    previous: Fingerprint | None = None
    for verdict in verdicts:
        name = verdict.checkpoint.name
        if verdict.problems:
            unknown.append(f"{name}: not compared with its neighbours, since it is bad")
            continue
        try:
            current = fingerprint(verdict.structure)
        except CheckpointError as error:
            unknown.append(f"{name}: not compared with its neighbours: {error}")
            continue
        if previous is not None:
            alike, incomparable = likenesses(previous, current)
            problems += alike
            unknown += incomparable
        previous = current
    if len(verdicts) < 2:
        unknown.append("--deep compares neighbouring checkpoints, and there is only one")
    return problems, unknown


def _print(verdict: Verdict) -> None:
    structure = verdict.structure
    size = sum(structure.sizes.values())
    how = "digests of its manifest" if verdict.manifest is not None else "torch's checksums"
    state = "BAD " if verdict.problems else "good"
    say(
        f"{state} {verdict.checkpoint.name}  {counted(len(structure.sizes), 'file')}, "
        f"{number(round(size / 1e6))} MB, compared with {how}"
    )
    _print_lines(verdict.notes, verdict.problems, verdict.unknown, indent="     ")


def _print_lines(
    notes: Iterable[str], problems: Sequence[str], unknown: Iterable[str], *, indent: str
) -> None:
    for line in notes:
        say(f"{indent}note     {printable(line)}")
    for line in unknown:
        say(f"{indent}unknown  {printable(line)}")
    for line in problems[:_NAMED]:
        say(f"{indent}PROBLEM  {printable(line)}")
    if len(problems) > _NAMED:
        say(f"{indent}         and {len(problems) - _NAMED} more")


def _result(verdicts: Sequence[Verdict], problems: Sequence[str], status: int) -> str:
    bad = sum(bool(verdict.problems) for verdict in verdicts)
    if bad:
        return f"result   {bad} of {counted(len(verdicts), 'checkpoint')} bad"
    if problems:
        return f"result   {counted(len(problems), 'problem')} beside the checkpoints' files"
    if status == CANNOT_TELL:
        return "result   nothing is wrong, but not everything could be checked"
    return f"result   {counted(len(verdicts), 'checkpoint')} good"


def _as_json(verdict: Verdict) -> dict[str, Any]:
    manifest = verdict.manifest
    return {
        "checkpoint": str(verdict.checkpoint),
        "step": verdict.structure.step,
        "is_good": not verdict.problems,
        "sequence": None if manifest is None else manifest.sequence,
        "compared_with": "checksums" if manifest is None else "manifest",
        "files": len(verdict.structure.sizes),
        "bytes": sum(verdict.structure.sizes.values()),
        "problems": verdict.problems,
        "unknown": verdict.unknown,
        "notes": verdict.notes,
    }


if __name__ == "__main__":
    sys.exit(main())
