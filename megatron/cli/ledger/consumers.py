"""What ``document``, ``shard`` and ``bytes`` have in common: options, tables, JSON."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.cli.ledger.options import (
    add_data_option,
    add_json_option,
    add_run_option,
    add_stream_option,
    opened_run,
    step_number,
)
from megatron.cli.ledger.output import counted, number, print_json, print_table, say
from megatron.ledger.ledger_file import DatasetNote
from megatron.ledger.queries.consumer_rows import ConsumerRow, StepTotal, consumer_rows, step_totals
from megatron.ledger.queries.consumers import (
    Consumed,
    Course,
    abandoned_courses,
    all_datasets,
    lineage_course,
)
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.run_view import RunView

__all__ = ["Question", "add_consumer_options", "opened_question", "print_consumers", "print_totals"]


def add_consumer_options(parser: argparse.ArgumentParser) -> None:
    """Add which run, which stream, and whether abandoned and future steps count."""
    add_run_option(parser)
    add_stream_option(parser)
    parser.add_argument(
        "--abandoned", action="store_true", help="list steps too that a crash or roll-back undid"
    )
    parser.add_argument(
        "--until",
        type=step_number,
        metavar="N",
        help="list steps too that are not done yet, up to step N",
    )
    add_data_option(parser)
    add_json_option(parser)


@dataclass(frozen=True)
class Question:
    """A run with the parts of it that are searched."""

    run: RunView
    courses: list[Course]
    datasets: dict[str, DatasetNote]
    data: RunData

    def ask(self, find: Callable[[Course], Iterator[Consumed]]) -> list[Consumed]:
        """Search every part."""
        return [one for course in self.courses for one in find(course)]


def opened_question(options: argparse.Namespace) -> Question:
    """Open what the options name."""
    run = opened_run(options)
    courses = [lineage_course(run, options.stream, until=options.until)]
    if options.abandoned and options.stream == "train":
        courses += abandoned_courses(run)
    datasets = all_datasets(courses)
    return Question(run, courses, datasets, RunData(datasets, options.data))


def print_consumers(
    question: Question, found: list[Consumed], asked: dict[str, Any], *, as_json: bool, what: str
) -> None:
    """Print every sample that consumed something."""
    rows = consumer_rows(question.run, found)
    if as_json:
        print_json({**asked, "consumed": [row._asdict() for row in rows]})
        return
    say(f"{what}: {_summary(rows)}")
    if not rows:
        return
    say("")
    headings = ["step>", "attempt", "position>", "rank>", "micro step>", "row>", "epoch>"]
    headings += ["sample>", "document>", "tokens>"]
    print_table(headings, [_line(row) for row in rows])


def print_totals(
    question: Question, found: list[Consumed], asked: dict[str, Any], *, as_json: bool, what: str
) -> None:
    """Print how much every step consumed."""
    totals = step_totals(found)
    if as_json:
        print_json({**asked, "steps": [total._asdict() for total in totals]})
        return
    say(f"{what}: {counted(len({total.step for total in totals}), 'step')}")
    if not totals:
        return
    say("")
    print_table(["step>", "", "samples>", "tokens>"], [_total(total) for total in totals])


def _summary(rows: list[ConsumerRow]) -> str:
    kept = [row for row in rows if not row.is_abandoned]
    samples = len({row.position for row in kept})
    text = f"{counted(len({row.step for row in kept}), 'step')}, {counted(samples, 'sample')}"
    if len(kept) < len(rows):
        abandoned = len({(row.attempt, row.position) for row in rows if row.is_abandoned})
        text += f", and {counted(abandoned, 'sample')} of abandoned steps"
    return text


def _line(row: ConsumerRow) -> list[object]:
    attempt = "-" if row.attempt is None else str(row.attempt)
    return [
        row.step,
        f"{attempt} abandoned" if row.is_abandoned else attempt,
        row.position,
        row.data_parallel_rank,
        row.micro_step,
        row.row,
        row.epoch,
        row.sample if row.block == 0 else f"{row.block}:{row.sample}",
        row.document,
        f"{row.start}..{row.stop}",
    ]


def _total(total: StepTotal) -> list[object]:
    mark = "abandoned" if total.is_abandoned else ""
    return [total.step, mark, number(total.samples), number(total.tokens)]
