"""What three passes over the same run say of its steps, side by side."""

import filecmp
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from rich.table import Table

from megatron.ledger.attempts import StepRecord

__all__ = [
    "Passes",
    "by_step",
    "comparison_table",
    "differences",
    "evaluation_differences",
    "weight_differences",
]

# Everything but the clock must repeat.
_COMPARED = tuple(field.name for field in fields(StepRecord) if field.name != "seconds")


@dataclass(frozen=True)
class Passes:
    """The steps of each pass, by step number."""

    undisturbed: Mapping[int, StepRecord]
    killed: Mapping[int, StepRecord]
    resumed: Mapping[int, StepRecord]


def by_step(records: Sequence[StepRecord]) -> dict[int, StepRecord]:
    """Index ``records`` by their step."""
    return {record.step: record for record in records}


def differences(passes: Passes, *, train_iters: int, saved_step: int) -> list[str]:
    """Return every way in which the killed and resumed passes are not the undisturbed one.

    Numbers are compared for equality, to the last bit.

    Args:
        passes: what was recorded.
        train_iters: the last step.
        saved_step: step of the newest checkpoint when the pass was killed.
    """
    expected_steps = {
        "undisturbed": set(range(1, train_iters + 1)),
        "resumed": set(range(saved_step + 1, train_iters + 1)),
    }
    problems = [
        f"the {name} pass recorded steps {_span(getattr(passes, name))}, not {_span(steps)}"
        for name, steps in expected_steps.items()
        if set(getattr(passes, name)) != steps
    ]
    for name in ("killed", "resumed"):
        for step, record in sorted(getattr(passes, name).items()):
            reference = passes.undisturbed.get(step)
            if reference is not None:
                problems += _record_differences(name, record, reference)
    return problems


def _record_differences(name: str, record: StepRecord, reference: StepRecord) -> list[str]:
    return [
        f"step {record.step}: {member} is {getattr(record, member)!r} in the {name} pass, "
        f"{getattr(reference, member)!r} undisturbed"
        for member in _COMPARED
        if getattr(record, member) != getattr(reference, member)
    ]


def weight_differences(undisturbed: Path, resumed: Path) -> list[str]:
    """Return what differs between the weight files of two checkpoints, byte by byte."""
    names, others = (
        sorted(file.name for file in checkpoint.glob("layer_*.pt"))
        for checkpoint in (undisturbed, resumed)
    )
    if not names or names != others:
        return [f"{undisturbed} and {resumed} hold other layers: {names} and {others}"]
    _, unequal, unreadable = filecmp.cmpfiles(undisturbed, resumed, names, shallow=False)
    return [f"{resumed}/{name} is not the undisturbed one" for name in unequal + unreadable]


def evaluation_differences(undisturbed: str, resumed: str) -> list[str]:
    """Return which evaluations in a resumed pass's console log the undisturbed one lacks."""
    known = _evaluations(undisturbed)
    found = _evaluations(resumed)
    if not found:
        return ["the resumed pass evaluated nothing"]
    return [f"undisturbed there is no such evaluation: {line}" for line in found - known]


def _evaluations(log: str) -> set[str]:
    return {line.strip() for line in log.splitlines() if " results at " in line}


def _span(steps: Sequence[int] | Mapping[int, object] | set[int]) -> str:
    return f"{min(steps)}..{max(steps)} ({len(steps)})" if steps else "none"


def comparison_table(passes: Passes, *, saved_step: int) -> Table:
    """Return the losses side by side: the first steps, every tenth, and those around the kill."""
    table = Table(title="loss by step")
    for heading in ("step", "undisturbed", "killed", "resumed", ""):
        table.add_column(heading, justify="left" if heading == "" else "right")
    killed_step = max(passes.killed, default=0)
    for step in sorted(passes.undisturbed):
        if not (step == 1 or step % 10 == 0 or saved_step - 1 <= step <= killed_step + 2):
            continue
        losses = [
            records[step].loss if step in records else None
            for records in (passes.undisturbed, passes.killed, passes.resumed)
        ]
        known = {loss for loss in losses if loss is not None}
        note = "equal" if len(known) == 1 else "DIFFERENT"
        if step == saved_step:
            note += ", saved"
        if step == killed_step:
            note += ", killed after it"
        if sum(loss is not None for loss in losses) == 1:
            note = note.removeprefix("equal").removeprefix(", ")
        table.add_row(str(step), *("" if loss is None else f"{loss:.9f}" for loss in losses), note)
    return table
