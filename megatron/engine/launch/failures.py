"""Which rank failed first, and how that is told.

When one rank fails, its peers soon fail too: their connections to it break. Their tracebacks are
as loud as the first one and say nothing. The first failure is the earliest sign of one: the moment
a rank's last traceback began, or, if it left none, the moment it was seen to have ended. On a busy
machine two signs may be seen in the wrong order; so one that only tells of a lost connection gives
way to another that came soon after it.
"""

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from megatron.base.exit_codes import FINISHED, STOPPED
from megatron.engine.launch.rank_process import Exit
from megatron.engine.launch.watchdog import RankProgress

__all__ = ["RankEnd", "failure_report", "first_failure"]

# A traceback this long before the first death was handled by its program: it is no sign of failure.
_HANDLED_AFTER_S = 10.0
# Signs this close may be seen in either order.
_SAME_TIME_S = 1.0
_LOST_PEER = re.compile(r"connection|broken pipe|remote worker|peer", re.IGNORECASE)
_LISTED = 8
_EXCERPT_LIMIT = 1 << 16  # characters that go from node to node


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended. Times are seconds since the start."""

    rank: int
    pid: int
    exit: Exit
    ended_at: float
    trace_began_at: float | None  # when its last traceback began; None without one
    was_told: bool  # it still ran when the launcher began to end the job
    excerpt: str  # its traceback, or its last lines on stderr
    host: str = ""  # of a job on several nodes
    progress: RankProgress | None = None  # of one that told of it

    def as_fields(self) -> dict[str, Any]:
        """Return what :meth:`from_fields` reads."""
        return asdict(self) | {"excerpt": self.excerpt[-_EXCERPT_LIMIT:]}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Return what another node told with :meth:`as_fields`."""
        progress = fields.get("progress")
        return cls(
            **{
                **fields,
                "exit": Exit(**fields["exit"]),
                "progress": None if progress is None else RankProgress(**progress),
            }
        )

    def __str__(self) -> str:
        how = "ended by the launcher" if self.was_told and self.exit.signal else str(self.exit)
        if self.exit.signal == signal.SIGKILL and not self.was_told:
            how += " (not by the launcher; often by the kernel when memory runs out, see dmesg)"
        return f"rank {self.rank}{' on ' * bool(self.host)}{self.host}: {how}"

    @property
    def status(self) -> int:
        """The job's status if this rank failed first."""
        if self.was_told and self.exit.signal is not None:
            return 1  # the launcher's signal only came before the program's own end
        return self.exit.status

    @property
    def was_on_purpose(self) -> bool:
        """Whether it ended as it should: its work is done, or it has saved and stopped."""
        return self.exit.code in (FINISHED, STOPPED)

    @property
    def was_only_told(self) -> bool:
        """Whether nothing but the launcher's signal ended it."""
        return self.was_told and self.exit.signal is not None and self.trace_began_at is None

    @property
    def blames_a_peer(self) -> bool:
        """Whether its last words are about a lost connection, not about an error of its own."""
        words = [line for line in self.excerpt.splitlines() if line and not line[0].isspace()]
        return self.trace_began_at is not None and any(map(_LOST_PEER.search, words[-3:]))


def first_failure(ends: Sequence[RankEnd]) -> RankEnd | None:
    """Return the rank that failed first, or None if none did."""
    failed = [end for end in ends if not end.was_on_purpose]
    if not failed:
        return None
    first_death = min(end.ended_at for end in failed)

    def first_sign(end: RankEnd) -> float:
        began_at = end.trace_began_at
        if began_at is not None and began_at >= first_death - _HANDLED_AFTER_S:
            return min(began_at, end.ended_at)
        return end.ended_at

    ordered = sorted(failed, key=lambda end: (first_sign(end), end.ended_at))
    together = [end for end in ordered if first_sign(end) <= first_sign(ordered[0]) + _SAME_TIME_S]
    own = [end for end in together if not end.blames_a_peer and not end.was_only_told]
    return own[0] if own else ordered[0]


def failure_report(ends: Sequence[RankEnd], first: RankEnd) -> str:
    """Return the last words of a failed job: who failed first, with its traceback."""
    others = [end for end in ends if end is not first and not end.was_on_purpose]
    then = "; ".join(map(str, others[:_LISTED]))
    if len(others) > _LISTED:
        then += f"; and {len(others) - _LISTED} more"
    facts = f"{first}, after {first.ended_at:.1f} s (process {first.pid})"
    end = f"---- the job ends with status {first.status}\n"
    if len(ends) == 1:
        return f"---- deepy: {facts}\n{end}"  # what it wrote stands right above
    text = f"---- deepy: of {len(ends)} ranks this one failed first:\n---- {facts}\n"
    text += first.excerpt or "(it wrote nothing on stderr)\n"
    if then:
        text += f"---- then {then}\n"
    return text + end
