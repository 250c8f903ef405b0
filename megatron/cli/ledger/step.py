"""``neox-ledger step N``: which samples a step consumed, from which documents and bytes."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.base.errors import DatasetError
from megatron.cli.ledger.options import (
    add_data_option,
    add_json_option,
    add_run_option,
    add_stream_option,
    opened_run,
    step_number,
)
from megatron.cli.ledger.output import common_directory, note, number, print_json, print_table, say
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.run_view import RunView
from megatron.ledger.queries.samples import (
    Draw,
    Slot,
    StepFrame,
    recorded_line,
    step_draws,
    step_frame,
    step_slots,
)
from megatron.stream.explanations import ByteRange, SampleParts

EPILOG = """examples:
  neox-ledger step 1000 --run runs/pythia
  neox-ledger step 1000 --run runs/pythia --rank 3 --json
  neox-ledger step 7 --run /mnt/copied/global_step1000 --data /mnt/pile/pile_text_document
  neox-ledger step 2 --stream valid --run runs/pythia      the second evaluation"""

_STAGES = {
    "recorded": "recorded",
    "adopted": "adopted: computed from the checkpoint it began with, ranks and rows too; not "
    "observed",
    "unrecorded": "done before the checkpoint; the line that recorded it is not here",
    "planned": "not done yet; what the run would consume",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("step", type=step_number, metavar="N", help="the step, from 1")
    add_run_option(parser)
    add_stream_option(parser)
    parser.add_argument("--rank", type=int, help="only samples of this data-parallel rank")
    parser.add_argument("--micro-step", type=int, help="only samples of this micro step, from 0")
    add_data_option(parser)
    add_json_option(parser)


def run(options: argparse.Namespace) -> int:
    """Answer, without the parts that need data that isn't there."""
    view = opened_run(options)
    frame = step_frame(view, options.step, options.stream)
    data = RunData(view.ledger.datasets, options.data)
    found: Sequence[SampleParts] | None = None
    missing = None
    try:
        found = data.stream(frame.order).explain(frame.order_positions)
    except DatasetError as error:
        missing = str(error)
    answer = _Answer(
        view,
        frame,
        draws=step_draws(frame.order, frame.order_positions),
        slots=step_slots(frame),
        parts=found,
    )
    chosen = answer.chosen(rank=options.rank, micro_step=options.micro_step)
    if options.json:
        print_json(answer.as_json(chosen, missing))
    else:
        answer.print(chosen)
        if not chosen:
            note(f"no sample of the step is there; it has {_extent_of(answer)}")
        if missing is not None:
            note(f"documents and bytes are not known: {missing}")
    return 0


@dataclass(frozen=True, kw_only=True)
class _Parts:
    draws: Sequence[Draw]
    slots: Sequence[Slot] | None  # None: the ledger doesn't tell how the batch was divided
    parts: Sequence[SampleParts] | None  # None: the data isn't there


@dataclass(frozen=True)
class _Answer(_Parts):
    view: RunView
    frame: StepFrame

    def chosen(self, *, rank: int | None, micro_step: int | None) -> list[int]:
        """Return the rows of the step that were asked for."""
        rows = range(len(self.frame.positions))
        if self.slots is None:
            return list(rows)
        return [
            row
            for row in rows
            if rank in (None, self.slots[row].data_parallel_rank)
            and micro_step in (None, self.slots[row].micro_step)
        ]

    def print(self, rows: Sequence[int]) -> None:
        """Print a few lines on the step and a table of its samples."""
        frame = self.frame
        record = recorded_line(self.view, frame)
        first, last = frame.positions.start, frame.positions.stop - 1
        what = "step" if frame.stream == "train" else f"{frame.stream} evaluation"
        say(
            f"{what} {frame.step}: positions {number(first)} to {number(last)} of the "
            f"{frame.stream} stream, order {frame.order.order_id[:12]} from position "
            f"{number(frame.order_positions.start)}"
        )
        taken = "" if frame.span is None else f", attempt {frame.span.attempt}"
        say(_STAGES[frame.stage] + taken)
        if record is not None:
            say(f"digest {record.digest}, loss {_loss(record.loss)}")
        say("")
        folder = common_directory(piece.path for row in rows for piece in self._pieces(row))
        if folder is not None:
            say(f"files in {folder}", "")
        headings = ["position>", "rank>", "micro step>", "row>", "dataset", "sample>", "document>"]
        headings += ["tokens>", "file", "bytes>"]
        print_table(headings, [line for row in rows for line in self._lines(row, folder)])

    def as_json(self, rows: Sequence[int], missing: str | None) -> dict[str, Any]:
        """Return the answer as plain values."""
        frame, span = self.frame, self.frame.span
        record = recorded_line(self.view, frame)
        return {
            "run": self.view.ledger.run_id,
            "stream": frame.stream,
            "step": frame.step,
            "stage": frame.stage,
            "attempt": None if span is None else span.attempt,
            "order": frame.order.order_id,
            "positions": [frame.positions.start, frame.positions.stop],
            "order_position": frame.order_positions.start,
            "digest": None if record is None else record.digest,
            "loss": None if record is None or math.isnan(record.loss) else record.loss,
            "data_missing": missing,
            "samples": [self._sample(row) for row in rows],
        }

    def _sample(self, row: int) -> dict[str, Any]:
        draw = self.draws[row]
        component = self.frame.order.components[draw.component]
        slot = None if self.slots is None else self.slots[row]
        sample: dict[str, Any] = {
            "position": self.frame.positions[row],
            "component": component.key,
            "component_position": draw.position,
            "dataset": self._dataset(draw),
            "data_parallel_rank": None if slot is None else slot.data_parallel_rank,
            "micro_step": None if slot is None else slot.micro_step,
            "row": None if slot is None else slot.row,
        }
        if self.parts is not None:
            parts = self.parts[row]
            sample["dataset"] = parts.prefix
            sample["block"] = parts.block
            sample["epochs"] = [parts.epochs.start, parts.epochs.stop - 1]
            sample["sample"] = parts.sample
            sample["padding"] = parts.padding
            sample["documents"] = [
                {
                    "document": part.document,
                    "tokens": [part.start, part.stop],
                    "bytes": [
                        {"file": str(piece.path), "bytes": [piece.start, piece.stop]}
                        for piece in part.bytes
                    ],
                }
                for part in parts.documents
            ]
        return sample

    def _lines(self, row: int, folder: object) -> list[list[object]]:
        """Return the table's lines of one sample: one per document and file."""
        draw = self.draws[row]
        slot = None if self.slots is None else self.slots[row]
        places = (
            [None] * 3 if slot is None else [slot.data_parallel_rank, slot.micro_step, slot.row]
        )
        name = self._dataset(draw).rpartition("/")[2]
        head: list[object] = [self.frame.positions[row], *places, name]
        if self.parts is None:
            return [[*head, None, None, None, None, None]]
        parts = self.parts[row]
        block = "" if parts.block == 0 else f"{parts.block}:"
        head.append(f"{block}{parts.sample}")
        lines: list[list[object]] = []
        for part in parts.documents:
            cells: list[object] = [part.document, f"{part.start}..{part.stop}"]
            for piece in part.bytes:
                file = str(piece.path) if folder is None else piece.path.name
                lines.append([*head, *cells, file, f"{piece.start}..{piece.stop}"])
                head, cells = [""] * len(head), [""] * len(cells)
        return lines

    def _pieces(self, row: int) -> list[ByteRange]:
        if self.parts is None:
            return []
        return [piece for part in self.parts[row].documents for piece in part.bytes]

    def _dataset(self, draw: Draw) -> str:
        identity = self.frame.order.components[draw.component].dataset
        known = self.view.ledger.datasets.get(identity)
        return identity if known is None else known.path


def _extent_of(answer: _Answer) -> str:
    slots = answer.slots or ()
    ranks = max((slot.data_parallel_rank for slot in slots), default=0)
    micro_steps = max((slot.micro_step for slot in slots), default=0)
    return f"data-parallel ranks 0..{ranks} and micro steps 0..{micro_steps}"


def _loss(loss: float) -> str:
    return "not a number" if math.isnan(loss) else f"{loss:.6f}"
