"""All ranks end after the same step, because one of them was told to; no collective is needed.

A *beat* is the moment between two units of work: training steps, and batches of evaluations. Beats
are counted; every rank has the same ones. A rank that has a reason to stop at its beat b writes
"stop at beat b + 2" into the store of torch.distributed, unless a stop is there already. Every rank
begins a look into the store at each beat and reads the answer at the next one, so that a step waits
for no answer.

Why all ranks stop at the same beat V = b + 2, if rank r wrote it at its beat b:

1. No rank finishes a unit before every rank has begun it: the unit's loss, which every rank returns
   as a number, is a mean over all data-parallel ranks, each of whose parts went through all stages
   and all tensor ranks.
2. r begins unit b + 1, the one after its beat b, when the store has confirmed the entry. So whoever
   has finished unit b + 1, and stands at beat b + 1, begins a look there that finds the entry,
   for the store is one process (or one locked file) that answers in order. By beat b + 2 every
   rank knows V; some know it sooner, and wait for V.
3. Another rank's own reason changes nothing: an entry is made only if there is none, and its author
   is told which one stands. Nobody can write later than that: by 2. whoever comes to beat V knows.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from megatron.engine.stop_signals import StopSignals

__all__ = ["Cause", "Stop", "Stopping", "signal_cause"]

_BEATS_UNTIL_ALL_KNOW = 2
_numbers = itertools.count()  # of the trainings of a process, which may share one store


@dataclass(frozen=True)
class Stop:
    """Why a training ends before its last step."""

    reason: str  # "signal SIGUSR1", "time limit": what the attempt's record says
    told: str = ""  # more for the log
    error: str | None = None  # not a wish but a failure, after which nothing may be saved


Cause = Callable[[], Stop | None]
"""Asked at every beat whether this rank has a reason to stop; must be cheap."""


class Stopping:
    """The agreement of all ranks on when to stop.

    Args:
        store: of torch.distributed, shared by all ranks.
        causes: of this rank.
    """

    def __init__(self, store: Any, causes: Sequence[Cause] = ()) -> None:
        self._store = store
        self._causes = list(causes)
        self._key = f"neox/stop/{next(_numbers)}"
        self._beat = 0
        self._agreed: tuple[int, Stop] | None = None  # the beat, and why
        self._looker = ThreadPoolExecutor(1, thread_name_prefix="stop look")
        self._look: Future[bytes | None] | None = None

    def beat(self) -> Stop | None:
        """Call between two units of work; return why to stop here, on every rank or on none.

        Raises:
            RuntimeError: the store is gone, and with it rank 0.
        """
        self._beat += 1
        if self._agreed is None and self._look is not None:
            self._take(self._look.result())
        if self._agreed is None:
            self._ask_causes()
        if self._agreed is None:
            self._look = self._looker.submit(self._read)
            return None
        due, stop = self._agreed
        if self._beat > due:
            raise RuntimeError(f"at beat {self._beat} a stop at beat {due} came to light")
        return stop if self._beat == due else None

    def close(self) -> None:
        """Look no more."""
        self._looker.shutdown(wait=False)

    def _ask_causes(self) -> None:
        for cause in self._causes:
            stop = cause()
            if stop is not None:
                entry = {"at": self._beat + _BEATS_UNTIL_ALL_KNOW, **asdict(stop)}
                self._take(self._store.compare_set(self._key, "", json.dumps(entry)))
                return

    def _read(self) -> bytes | None:
        return self._store.get(self._key) if self._store.check([self._key]) else None

    def _take(self, text: bytes | None) -> None:
        if text is not None:
            entry = json.loads(text)
            self._agreed = entry.pop("at"), Stop(**entry)


def signal_cause(signals: StopSignals, rank: int) -> Cause:
    """Return what asks whether a signal has come."""

    def cause() -> Stop | None:
        wish = signals.wish
        return None if wish is None else Stop(f"signal {wish.name}", f"rank {rank} got it")

    return cause
