"""How a whole job ended, and what that means: one answer for one node and for many."""

from dataclasses import dataclass

from megatron.base.exit_codes import FINISHED, HUNG, NODE_LOST, STOPPED
from megatron.engine.launch.failures import RankEnd, failure_report, first_failure
from megatron.engine.launch.rank_process import signal_name
from megatron.engine.launch.watchdog import RankProgress, culprit, hang_report

__all__ = ["JobEnd"]


@dataclass(frozen=True)
class JobEnd:
    """What is known when nothing runs any more."""

    ends: tuple[RankEnd, ...]
    wishes: tuple[int, ...] = ()  # signals by which somebody asked the job to stop
    hang: str | None = None  # which rank was over its time, in words
    lost: tuple[str, ...] = ()  # which nodes went away, in words

    @property
    def status(self) -> int:
        """The job's exit status; 0 only if every rank ended with 0."""
        first = self._first_failure
        if self._is_node_loss(first):
            return NODE_LOST
        if self.hang is not None:
            return HUNG
        if first is None:
            return STOPPED if any(end.exit.code for end in self.ends) else FINISHED
        number = self._stopped_by(first)
        return first.status if number is None else 128 + number

    @property
    def reason(self) -> str:
        """Why the job ended before its ranks had noted it themselves, for the run's record."""
        first = self._first_failure
        if self._is_node_loss(first):
            return f"node lost: {'; '.join(self.lost)}"
        if self.hang is not None:
            return f"hung: {culprit(self._progress) or self.hang}"
        if first is None:
            return "ended"
        if (number := self._stopped_by(first)) is not None:
            return f"signal {signal_name(number)}"
        return f"failed: rank {first.rank}: {first.exit}"

    @property
    def done_step(self) -> int | None:
        """The last step that rank 0 had done, if it told."""
        progress = [one.progress for one in self.ends if one.rank == 0]
        return progress[0].done_step if progress and progress[0] is not None else None

    @property
    def _first_failure(self) -> RankEnd | None:
        first = first_failure(self.ends)
        if first is None or not (first.blames_a_peer or first.was_only_told):
            return first
        # Who is told to stop while starting leaves at once; peers see a lost connection.
        stopped = [end.ended_at for end in self.ends if end.exit.code == STOPPED]
        return None if stopped and min(stopped) <= first.ended_at else first

    @property
    def _progress(self) -> list[RankProgress]:
        return [one.progress for one in self.ends if one.progress is not None]

    def report(self) -> str:
        """Return the job's last words; nothing if all is well."""
        first = self._first_failure
        end = f"---- the job ends with status {self.status}\n"
        if self._is_node_loss(first):
            text = "".join(f"---- deepy: lost {node}\n" for node in self.lost)
            if first is not None and not first.was_only_told:
                text += f"---- first to notice: {first}\n{first.excerpt}"
            return text + end
        if self.hang is not None:
            text = f"---- deepy: no progress: {self.hang}; the stacks of all ranks are above\n"
            return text + hang_report(self._progress) + end
        if first is None:
            if self.status == FINISHED:
                return ""
            wish = f" ({signal_name(self.wishes[0])})" if self.wishes else ""
            return f"deepy: stopped on purpose{wish}; the same command goes on from the last save\n"
        if (number := self._stopped_by(first)) is not None:
            return f"deepy: stopped by {signal_name(number)} after {first.ended_at:.1f} s\n"
        return failure_report(self.ends, first)

    def _is_node_loss(self, first: RankEnd | None) -> bool:
        # When a node goes, ranks elsewhere complain of lost connections; an error of a rank's own
        # that came before is what matters.
        if not self.lost:
            return False
        was_asked = first is not None and first.exit.signal in self.wishes
        return first is None or first.was_told or first.blames_a_peer or was_asked

    def _stopped_by(self, first: RankEnd) -> int | None:
        """Return the signal that ended the job on the user's wish, if one did."""
        if first.exit.signal in self.wishes:
            return first.exit.signal
        return self.wishes[0] if self.wishes and first.was_told and first.exit.signal else None
