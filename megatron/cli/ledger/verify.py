"""``neox-ledger verify``: do the records agree with each other, with the plan and with the data?"""

import argparse
import dataclasses
from typing import Any

from megatron.cli.ledger.options import (
    add_data_option,
    add_json_option,
    add_run_option,
    opened_run,
    step_range,
)
from megatron.cli.ledger.output import counted, number, print_json, say
from megatron.cli.ledger.progress import progress
from megatron.ledger.queries.findings import Problem, Report
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.verification import Extent, verify

EPILOG = """exit status:
  0  everything that was checked agrees
  1  something disagrees; the first step is named
  2  nothing disagrees, but something could not be checked

examples:
  neox-ledger verify --run runs/pythia                       100 steps drawn by lot
  neox-ledger verify --run runs/pythia --all                 every step
  neox-ledger verify --run runs/pythia --steps 990..1010
  neox-ledger verify --run runs/pythia --no-data             records only"""

_SAMPLE = 100
_NAMED = 20  # problems that are printed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_run_option(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--steps", type=step_range, metavar="A..B", help="compute the digests of these steps"
    )
    which.add_argument("--all", action="store_true", help="compute the digests of all steps")
    which.add_argument(
        "--sample",
        type=int,
        default=_SAMPLE,
        metavar="K",
        help=f"compute the digests of K steps drawn by lot (default: {_SAMPLE})",
    )
    which.add_argument("--no-data", action="store_true", help="check the records only")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    parser.add_argument(
        "--full", action="store_true", help="hash every byte of large datasets, not a sample"
    )
    add_data_option(parser)
    add_json_option(parser)


def run(options: argparse.Namespace) -> int:
    """Verify, say what was looked at, and name the first step that disagrees."""
    view = opened_run(options)
    extent = Extent(
        steps=options.steps,
        sample=None if options.all or options.steps is not None else options.sample,
        seed=options.seed,
    )
    data = (
        None if options.no_data else RunData(view.ledger.datasets, options.data, full=options.full)
    )
    with progress("steps computed from the data") as on_step:
        report = verify(view, data, extent, on_step=on_step)
    if options.json:
        print_json(_as_json(report))
    else:
        _print(report, is_data_asked=data is not None)
    return report.exit_status


def _print(report: Report, *, is_data_asked: bool) -> None:
    say(f"lineage    steps 1..{number(report.last_step)}")
    if report.adopted is not None:
        say(f"adopted    steps {report.adopted}: computed, not observed")
    say(
        f"recorded   {counted(report.recorded, 'step')} and "
        f"{counted(report.evaluations, 'evaluation')}, each line continuing the one before"
        if not _has(report, "lines")
        else f"recorded   {counted(report.recorded, 'step')} with lines that fit; not all do"
    )
    if not _has(report, "positions") and not _has(report, "lines"):
        say("positions  every one consumed once (no repeat, no skip)")
    if is_data_asked:
        say(
            f"digests    {counted(len(report.recomputed), 'step')} and "
            f"{counted(report.recomputed_evaluations, 'evaluation')} computed from the data"
        )
    for change in report.accepted:
        say(
            f"break      after step {change.after_step}, as accepted "
            f"({', '.join(change.keys)}): up to step {change.horizon_step} "
            f"{number(change.repeated.tokens)} tokens repeated, "
            f"{number(change.skipped.tokens)} skipped, {number(change.new.tokens)} new"
            + ("" if change.is_exact else " (estimated)")
        )
    for path, level in report.datasets.items():
        if level != "complete":
            how = "samples of its bytes" if level == "sampled" else "its index and what is there"
            say(f"dataset    {path} is known by {how}")
    for warning in report.warnings:
        say(f"warning    {warning}")
    for unknown in report.unknown:
        say(f"unknown    {unknown}")
    for problem in report.problems[:_NAMED]:
        say(f"PROBLEM    {problem}")
    if len(report.problems) > _NAMED:
        say(f"           and {len(report.problems) - _NAMED} more")
    say(_verdict(report))


def _has(report: Report, check: str) -> bool:
    return any(problem.check == check for problem in report.problems)


def _verdict(report: Report) -> str:
    if report.problems:
        first = report.problems[0]
        where = f"first at step {first.step}" if first.step is not None else "of no single step"
        return f"result     {counted(len(report.problems), 'disagreement')}, {where}"
    if report.unknown:
        return "result     nothing disagrees, but not everything could be checked"
    return "result     everything agrees"


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "exit_status": report.exit_status,
        "last_step": report.last_step,
        "first_problem": _problem(report.problems[0]) if report.problems else None,
        "problems": [_problem(problem) for problem in report.problems],
        "warnings": list(report.warnings),
        "unknown": list(report.unknown),
        "recorded_steps": report.recorded,
        "recorded_evaluations": report.evaluations,
        "adopted": [report.adopted.first, report.adopted.last] if report.adopted else None,
        "unrecorded": [[one.first, one.last] for one in report.unrecorded],
        "recomputed_steps": list(report.recomputed),
        "recomputed_evaluations": report.recomputed_evaluations,
        "accepted": [dataclasses.asdict(change) for change in report.accepted],
        "datasets": report.datasets,
    }


def _problem(problem: Problem) -> dict[str, Any]:
    return {
        "check": problem.check,
        "step": problem.step,
        "file": None if problem.path is None else str(problem.path),
        "line": problem.line,
        "text": problem.text,
    }
