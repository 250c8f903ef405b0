"""What a configuration asks of one launch only, and whether a launch does it or just goes on.

``iteration: N``, ``finetune: true``, a ``load`` that isn't ``save``, and no ``load`` at all are
obeyed once: when a job is queued again, the same command must go on where the run is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

__all__ = ["Decision", "InstructedAttempt", "Instruction", "decide"]

Kind = Literal["iteration", "finetune", "load", "start"]


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """Where a launch shall begin, other than where its ``save`` is."""

    kind: Kind  # "start": at step 0, because load is unset
    iteration: int | None = None
    load: str | None = None  # absolute

    @classmethod
    def of(
        cls, *, load: Path | None, save: Path, iteration: int | None, finetune: bool
    ) -> Self | None:
        """Return what the keys ask for; None if they only ask to continue ``save``."""
        if load is None:
            return cls(kind="start")
        path = load.resolve()
        if finetune:
            return cls(kind="finetune", iteration=iteration, load=str(path))
        if iteration is not None:
            return cls(kind="iteration", iteration=iteration, load=str(path))
        return None if path == save.resolve() else cls(kind="load", load=str(path))

    def __str__(self) -> str:
        if self.kind == "start":
            return "start at step 0 (load is not set)"
        named = f"iteration: {self.iteration} of " if self.iteration is not None else ""
        prefix = "finetune from " if self.kind == "finetune" else "load "
        return f"{prefix}{named}{self.load}"


@dataclass(frozen=True, kw_only=True)
class InstructedAttempt:
    """What an earlier launch of the run was asked, and what came of it."""

    number: int
    instruction: Instruction | None
    obeyed: bool  # False: it continued the run instead
    committed_steps: Sequence[int]  # of the checkpoints it committed


@dataclass(frozen=True)
class Decision:
    """Whether the instruction is obeyed; otherwise the launch continues ``save``."""

    obeys: bool
    reason: str  # a sentence for the plan


def decide(instruction: Instruction | None, attempts: Sequence[InstructedAttempt]) -> Decision:
    """Decide whether a launch obeys ``instruction`` or continues what is in ``save``.

    It continues if the newest attempt carried the same instruction and a checkpoint was committed
    since that was last obeyed. So 100, 200, 100 rolls back three times, and a launch without the
    key in between allows the same one again.

    Args:
        instruction: what this launch is asked.
        attempts: earlier launches of the run that ``save`` holds, oldest first.

    Example:
        >>> rollback = Instruction(kind="iteration", iteration=100, load="/runs/a")
        >>> first = InstructedAttempt(
        ...     number=7, instruction=rollback, obeyed=True, committed_steps=[150]
        ... )
        >>> decide(rollback, [first]).obeys
        False
    """
    if instruction is None:
        return Decision(False, "nothing else is asked for: the run continues")
    committed: list[int] = []
    for attempt in reversed(attempts):
        if attempt.instruction != instruction:
            break
        committed = [*attempt.committed_steps, *committed]
        if not attempt.obeyed:
            continue
        if committed:
            return Decision(
                False,
                f"{instruction}: done by attempt {attempt.number}, which has saved since "
                f"(newest: step {committed[-1]}); the run continues from there",
            )
        return Decision(
            True, f"{instruction}: attempt {attempt.number} did so too, but saved nothing"
        )
    return Decision(True, str(instruction))
