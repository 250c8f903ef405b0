"""Signals that ask this process to stop.

Python's own handlers run only when the main thread comes back from C, which one that waits for a
rank that is gone never does. So a thread listens:

    first wish, before the loop     nothing is lost: the process ends at once (STOPPED)
    first wish, in the loop         kept; the loop ends where all ranks can (engine/stopping.py)
    second wish                     the process ends at once, 128 + N

One wish often comes as several signals: SLURM signals ranks itself and our launcher passes on what
it got, so what comes within two seconds is one. Nor is every later SIGTERM another wish: SLURM
sends one at its limit, after the signal that announced it, and at both ends of a preemption's
GraceTime. Its SIGKILL follows in any case; the time until then is for saving. Leaving at once
damages nothing, for neither does SIGKILL.
"""

import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron.base.exit_codes import STOPPED

__all__ = ["ONE_WISH_S", "STOP_SIGNALS", "StopSignals", "Wish", "stop_signals"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
ONE_WISH_S = 2.0

_ANNOUNCEMENTS = (signal.SIGUSR1, signal.SIGUSR2)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
_STDERR = 2


@dataclass(frozen=True)
class Wish:
    """Somebody wants this process to stop."""

    number: int  # of the signal
    came_at: float  # time.monotonic()

    @property
    def name(self) -> str:
        """Name of the signal, as in ``SIGTERM``."""
        return signal.Signals(self.number).name


class StopSignals:
    """Listens to the signals of :data:`STOP_SIGNALS` from :meth:`begin` to :meth:`end`.

    A signal that somebody else handles or ignores is left to them.

    Args:
        leave: ends the process at once with a status, after telling a line.
        clock: seconds that only go forward.
        is_slurms: whether SIGTERM may come from SLURM, again and again.
    """

    def __init__(
        self,
        leave: Callable[[int, str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        is_slurms: bool | None = None,
    ) -> None:
        self._leave = leave_at_once if leave is None else leave
        self._clock = clock
        self._is_slurms = "SLURM_JOB_ID" in os.environ if is_slurms is None else is_slurms
        self._is_kept = False
        self._first: Wish | None = None
        self._newest: Wish | None = None
        self._lock = threading.Lock()
        self._writer: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._watched: tuple[int, ...] = ()
        self._former_descriptor = -1

    @property
    def wish(self) -> Wish | None:
        """The first wish, if there is one."""
        return self._first

    def begin(self) -> None:
        """Listen from now on; again, or on another thread than the main one, do nothing."""
        if self._writer or threading.current_thread() is not threading.main_thread():
            return
        watched = [one for one in STOP_SIGNALS if signal.getsignal(one) in _DEFAULTS]
        if not watched:
            return
        self._watched = tuple(watched)
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # Before the handlers: the byte is written by C, whatever the main thread is doing.
        self._former_descriptor = signal.set_wakeup_fd(
            self._writer.fileno(), warn_on_full_buffer=False
        )
        for number in watched:
            signal.signal(number, _do_nothing)
        self._thread = threading.Thread(
            target=self._listen, args=(reader,), name="stop signals", daemon=True
        )
        self._thread.start()

    def keep(self) -> None:
        """From now on the first wish is for whoever asks for :attr:`wish`."""
        with self._lock:
            self._is_kept = True

    def end(self) -> None:
        """Signals do again what they do in any process; a wish that came is kept."""
        if self._writer is None:
            return
        self._restore(self._former_descriptor)
        if self._thread is not None:
            self._thread.join()

    def forget(self) -> None:
        """In a process forked from this one: its signals aren't for this one's thread."""
        if self._writer is not None:
            self._restore(-1)
        self._first = self._newest = self._thread = None
        self._is_kept = False
        self._lock = threading.Lock()  # the thread that held the other one isn't here

    def _restore(self, descriptor: int) -> None:
        for number in self._watched:
            if signal.getsignal(number) is _do_nothing:
                is_sigint = number == signal.SIGINT
                signal.signal(number, signal.default_int_handler if is_sigint else signal.SIG_DFL)
        signal.set_wakeup_fd(descriptor)
        if self._writer is not None:
            self._writer.close()  # ends the thread
        self._writer = None

    def _listen(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number in self._watched:
                        self._take(number)

    def _take(self, number: int) -> None:
        with self._lock:
            wish = Wish(number, self._clock())
            before, self._newest = self._newest, wish
            if self._first is None:
                self._first = wish
                if not self._is_kept:
                    self._leave(STOPPED, f"stopped by {wish.name} before the first step")
            elif before is not None and self._is_another(before, wish):
                self._leave(128 + number, f"stopped at once: {wish.name} after {before.name}")

    def _is_another(self, before: Wish, wish: Wish) -> bool:
        if wish.came_at - before.came_at < ONE_WISH_S:
            return False
        is_announced = self._is_slurms or before.number in _ANNOUNCEMENTS
        return not (wish.number == signal.SIGTERM and is_announced)


@functools.cache
def stop_signals() -> StopSignals:
    """Return this process's; the same ones every time."""
    signals = StopSignals()
    os.register_at_fork(after_in_child=signals.forget)
    return signals


def leave_at_once(status: int, told: str) -> None:
    """End the process from any thread, whatever the others are doing."""
    rank = os.environ.get("RANK")
    if rank in (None, "0"):
        os.write(_STDERR, f"{told}\n".encode())
    os._exit(status)


def _do_nothing(number: int, frame: object) -> None:
    """A handler must be there, or no byte is written."""
