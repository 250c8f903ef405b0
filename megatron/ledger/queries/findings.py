"""What verification finds: problems with where they are, and how much was looked at."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron.ledger.ledger_file import AcceptedChange
from megatron.ledger.lineage import StepRange

__all__ = ["Check", "Problem", "Report"]

Check = Literal["lines", "positions", "digests", "repetition"]


@dataclass(frozen=True)
class Problem:
    """One disagreement."""

    check: Check
    step: int | None  # the first step in doubt
    text: str
    path: Path | None = None
    line: int | None = None  # from 1

    def __str__(self) -> str:
        where = "" if self.path is None else f"{self.path}: "
        if self.line is not None:
            where = f"{self.path}:{self.line}: "
        step = "" if self.step is None else f"step {self.step}: "
        return f"{step}{where}{self.text}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was checked and what came of it."""

    last_step: int
    problems: tuple[Problem, ...] = ()  # by step
    warnings: tuple[str, ...] = ()  # losses that differ
    unknown: tuple[str, ...] = ()  # what was to be checked and could not be
    recorded: int = 0  # steps of the lineage with a line
    evaluations: int = 0
    adopted: StepRange | None = None
    unrecorded: tuple[StepRange, ...] = ()
    accepted: tuple[AcceptedChange, ...] = ()  # after which the order isn't continued
    recomputed: tuple[int, ...] = ()  # steps whose digests were computed from the data
    recomputed_evaluations: int = 0
    done_again: int = 0  # lines of steps or evaluations that were done before
    datasets: dict[str, str] = field(default_factory=dict)  # path -> how thoroughly it is known

    @property
    def exit_status(self) -> int:
        """Return 0 if all agrees, 1 if something disagrees, 2 if something can't be told."""
        if self.problems:
            return 1
        return 2 if self.unknown else 0
