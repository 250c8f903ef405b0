"""Whether the launches of a run get anywhere: how far each attempt came, and where it died."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.ledger.attempt_facts import AttemptFacts, read_all_attempt_facts
from megatron.ledger.attempts import attempt_lines_path, flush_interval
from megatron.ledger.line_search import FileEnd, read_end

__all__ = ["AttemptAdvance", "advances", "attempts_without_advance"]

_TOLD = "signal "  # begin of the stop reason of an attempt that was told to stop
_PLANNED = {"finished", "exit_interval", "time limit"}


@dataclass(frozen=True, kw_only=True)
class AttemptAdvance:
    """How far one attempt came, against all attempts before it."""

    facts: AttemptFacts
    last_step: int  # newest one with a line; the one it began after, if there is none
    saved_step: int | None  # newest checkpoint that it published
    has_advanced: bool  # it recorded or saved a step that no attempt had before
    unfinished_evaluation: int | None = None
    """Position of the validation stream at which the evaluation begins that it died in; None: it
    didn't, or nothing tells."""

    @property
    def died_in(self) -> range | None:
        """The step it died in, or before, or those that it may have died in.

        The lines of a few steps wait for their digests (:func:`flush_interval`); who was killed
        couldn't write them. None: it was stopped, not interrupted in a step.
        """
        stop = self.facts.stop
        if stop is not None and _is_planned(stop.reason):
            return None
        if stop is not None and stop.done_step is not None:
            return range(stop.done_step + 1, stop.done_step + 2)
        waiting = flush_interval(self.facts.config.get("log_interval"))
        return range(self.last_step + 1, self.last_step + 1 + waiting)

    @property
    def job(self) -> str | None:
        """SLURM's number of the job it ran in."""
        return self._variables.get("SLURM_JOB_ID")

    @property
    def restarts(self) -> int:
        """How often SLURM had requeued that job."""
        return int(self._variables.get("SLURM_RESTART_COUNT", 0))

    @property
    def nodes(self) -> str:
        """The machines it ran on, as far as they are known."""
        return self._variables.get("SLURM_JOB_NODELIST", self.facts.environment.get("host", "?"))

    @property
    def _variables(self) -> Mapping[str, str]:
        variables: Mapping[str, str] = self.facts.environment.get("job", {})
        return variables

    @property
    def is_stopped_from_outside(self) -> bool:
        """Whether it was told to stop, and closed its record."""
        stop = self.facts.stop
        return stop is not None and stop.reason.startswith(_TOLD)


def advances(save: Path) -> list[AttemptAdvance]:
    """Return how far every attempt of a run came, oldest first.

    An attempt that obeyed an instruction, such as a roll-back, sets the mark anew.

    Raises:
        RunDirectoryError: an attempt's file was damaged.
    """
    found: list[AttemptAdvance] = []
    recorded = saved = -1
    for facts in read_all_attempt_facts(save):
        path = attempt_lines_path(save, facts.number)
        end = read_end(path) if path.exists() else None
        begin = facts.begin.step
        last = begin if end is None or end.step is None else end.step.step
        newest = max((one.step for one in facts.committed), default=None)
        if facts.obeyed or not found:
            recorded = saved = begin
        found.append(
            AttemptAdvance(
                facts=facts,
                last_step=last,
                saved_step=newest,
                has_advanced=last > recorded or (newest is not None and newest > saved),
                unfinished_evaluation=_unfinished_evaluation(facts, last, end),
            )
        )
        recorded = max(recorded, last)
        saved = max(saved, -1 if newest is None else newest)
    return found


def attempts_without_advance(attempts: Sequence[AttemptAdvance]) -> list[AttemptAdvance]:
    """Return the newest attempts that came no further than those before, oldest first.

    The one before them is the first of them if it died in the same step. Attempts that were told to
    stop count neither for nor against a run.
    """
    stalled: list[AttemptAdvance] = []
    for attempt in reversed(attempts):
        if attempt.has_advanced:
            if stalled and _died_together(attempt, stalled[-1]):
                stalled.append(attempt)
            break
        if not attempt.is_stopped_from_outside:
            stalled.append(attempt)
    return stalled[::-1]


def _unfinished_evaluation(facts: AttemptFacts, last: int, end: FileEnd | None) -> int | None:
    """Return where the evaluation after step ``last`` begins, if an attempt died in it."""
    begin, stop = facts.begin, facts.stop
    if stop is None or stop.done_step != last or _is_planned(stop.reason) or last == 0:
        return None
    interval = facts.config.get("eval_interval")
    is_due = begin.evaluation_due if last == begin.step else interval and last % interval == 0
    stream = begin.streams.get("valid")
    if not is_due or stream is None:
        return None
    done = end.evaluations.get("valid") if end is not None else None
    if done is None:
        return stream.next_position
    return None if done.after_step == last else done.position + done.samples


def _is_planned(reason: str) -> bool:
    return reason in _PLANNED or reason.startswith(_TOLD)


def _died_together(one: AttemptAdvance, other: AttemptAdvance) -> bool:
    first, second = one.died_in, other.died_in
    if first is None or second is None:
        return False
    return first.start < second.stop and second.start < first.stop
