"""Token files that aren't there, and the first step that needs each."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from megatron.ledger.ledger_file import DatasetNote
from megatron.ledger.planning.continuation import StreamPlan
from megatron.ledger.planning.inputs import StreamName
from megatron.ledger.planning.resume_plan import ResumePlan
from megatron.stream.indexed_dataset import IndexedDataset
from megatron.stream.order_description import OrderDescription
from megatron.stream.required_files import first_missing
from megatron.stream.sample_stream import Stream

__all__ = ["MissingFile", "with_missing_files"]

_NAMED = 3  # files in a notice


@dataclasses.dataclass(frozen=True)
class MissingFile:
    """A token file that isn't there and that a planned step reads."""

    path: Path
    stream: StreamName
    step: int  # the first that reads it; of valid and test an evaluation

    def __str__(self) -> str:
        what = "step" if self.stream == "train" else f"{self.stream} evaluation"
        return f"{what} {self.step} needs {self.path}"


def with_missing_files(
    plan: ResumePlan,
    datasets: Mapping[str, DatasetNote],
    open_order: Callable[[OrderDescription], Stream],
    *,
    eval_interval: int | None,
) -> ResumePlan:
    """Return a plan that says which token files its steps lack; refused if the first step does.

    Nothing is opened if no file is missing.

    Args:
        plan: of a launch that isn't refused.
        datasets: that the launch reads, by identity.
        open_order: opens an order without its token files.
        eval_interval: steps between evaluations; None: none.
    """
    prefixes = {
        prefix for note in datasets.values() for prefix in (note.path, *note.companions.values())
    }
    shards = [shard for prefix in prefixes for shard in IndexedDataset(prefix).tokens.shards]
    num_missing = sum(not shard.is_there for shard in shards)
    if not num_missing or plan.problems:
        return plan
    needed = [
        missing
        for name, stream in plan.streams.items()
        if stream.is_read
        for missing in _needed(name, stream, _num_steps(name, plan, eval_interval), open_order)
    ]
    count = f"{num_missing} of {len(shards)} token files are missing"
    at_once = [
        missing
        for missing in needed
        if missing.step == plan.streams[missing.stream].next_step
        and (missing.stream == "train" or (missing.stream == "valid" and plan.evaluates_first))
        and plan.next_step <= plan.train_iters
    ]
    if at_once:
        more = f" and {len(at_once) - 1} more" if len(at_once) > 1 else ""
        problem = (
            f"{at_once[0]}{more}, which does not exist ({count}). Put it there; `neox-ledger "
            f"shards required-for {plan.next_step}..{plan.train_iters}` lists all that is read"
        )
        return dataclasses.replace(plan, kind="refuse", problems=(problem,))
    notice = f"{count}, none is read up to step {plan.train_iters}"
    if needed:
        more = f", and {len(needed) - _NAMED} more later" if len(needed) > _NAMED else ""
        notice = f"{count}: {', '.join(map(str, needed[:_NAMED]))}{more}"
    return dataclasses.replace(plan, notices=(*plan.notices, notice))


def _num_steps(name: StreamName, plan: ResumePlan, eval_interval: int | None) -> int:
    """Return how many steps, or evaluations, a launch takes at most."""
    last = plan.train_iters
    if name == "train":
        return max(0, last - plan.step)
    if name == "test":
        return 1
    between = last // eval_interval - plan.step // eval_interval if eval_interval else 0
    return max(0, between) + plan.evaluates_first + 1  # one more at the end


def _needed(
    name: StreamName,
    stream: StreamPlan,
    num_steps: int,
    open_order: Callable[[OrderDescription], Stream],
) -> Iterator[MissingFile]:
    start = stream.order_position
    positions = range(start, start + num_steps * stream.batch_size)
    for need in first_missing(open_order(stream.order), positions):
        step = stream.next_step + (need.position - start) // stream.batch_size
        yield MissingFile(need.path, name, step)
