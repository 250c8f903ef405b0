"""Do two steps hold different weights, as training leaves them, and all of them?

Of the released checkpoints some hold another step's weights, in all of their files or in one.
Every file of such a checkpoint is whole; only beside the other step can it be seen.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.cli.pythia.downloaded import Place
from megatron.cli.pythia.findings import Finding
from megatron.cli.pythia.measurements import Measured

__all__ = ["MAYBE_UNLEARNT", "MeasuredStep", "Measurements", "compared", "named"]

MAYBE_UNLEARNT = 16
"""Up to this step a run may have learnt nothing yet: the first update has learning rate 0, and fp16
steps that overflow at the first loss scales are skipped."""

_LISTED = 4

Measurements = Mapping[Place, Measured]


@dataclass(frozen=True)
class MeasuredStep:
    """The tensors of one directory."""

    path: Path
    step: int | None  # None: its path doesn't tell
    measured: Measurements

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path) if self.step is None else f"{self.path} (step {self.step})"

    @property
    def matrices(self) -> dict[Place, Measured]:
        """The tensors that every update changes somewhere."""
        return {place: one for place, one in self.measured.items() if one.is_matrix}


def compared(here: MeasuredStep, there: MeasuredStep, *, is_other_run: bool) -> Iterator[Finding]:
    """Yield what is equal though it can't be, and what differs though it can't.

    Args:
        here: what is checked.
        there: what it is compared with.
        is_other_run: they are of runs with different seeds, which have nothing in common.
    """
    mine, theirs = here.matrices, there.matrices
    common = [place for place in mine if place in theirs]
    if not common or any(mine[place].shape != theirs[place].shape for place in common):
        yield Finding("unknown", f"{there.path} is another model's; it was not compared")
        return
    # A tensor that differs after rounding to the narrower of the two types isn't equal.
    equal = [place for place in common if mine[place].digest == theirs[place].digest]
    if is_other_run:
        if equal:
            yield Finding(
                "wrong",
                f"{len(equal)} of {len(common)} matrices are those of {there.name}, which is "
                "another run's: runs with other seeds have nothing in common",
            )
        return
    if here.step is None or there.step is None:
        if equal:
            yield Finding(
                "warning",
                f"{len(equal)} of {len(common)} matrices are those of {there.path}, whose step its "
                "name doesn't tell",
            )
        return
    yield from _same_run(here, there, common, equal)


def _same_run(
    here: MeasuredStep, there: MeasuredStep, common: list[Place], equal: list[Place]
) -> Iterator[Finding]:
    first, last = sorted((here.step or 0, there.step or 0))
    if first == last:
        if len(equal) < len(common):
            yield Finding(
                "warning",
                f"{there.name} is the same step, but {len(common) - len(equal)} of {len(common)} "
                "matrices differ: of two uploads one is wrong, or they are of different runs",
            )
        return
    if (first, last) == (0, 1):
        if len(equal) < len(common):
            yield Finding(
                "wrong",
                f"steps 0 and 1 differ in {len(common) - len(equal)} of {len(common)} matrices, "
                "but the first update runs at learning rate 0: step 1 is of another run",
            )
        return
    if not equal:
        return
    maybe = last <= MAYBE_UNLEARNT
    kind = "warning" if maybe else "wrong"
    reason = (
        " (possible so early: the first update has learning rate 0, and fp16 may skip some)"
        if maybe
        else ""
    )
    if len(equal) == len(common):
        yield Finding(
            kind,
            f"all {len(common)} matrices are those of {there.name}: at least one of the two is the "
            f"other step's{reason}",
        )
    else:
        yield Finding(
            kind,
            f"mixed: {len(equal)} of {len(common)} matrices are those of {there.name}, the others "
            f"are not: {named(equal)}{reason}",
        )


def named(places: Sequence[Place]) -> str:
    """Return the first of ``places`` in words, and how many more there are."""
    more = len(places) - _LISTED
    names = ", ".join(f"layer {layer}'s {name}" for layer, name in places[:_LISTED])
    return names + (f" and {more} more" if more > 0 else "")
