"""Signals as events one can wait for together with pipes."""

import contextlib
import signal
import socket
from collections.abc import Iterator, Sequence

__all__ = ["SignalInbox", "open_signal_inbox"]


class SignalInbox:
    """Signals that have arrived and were not looked at yet."""

    def __init__(self, reader: socket.socket) -> None:
        self._reader = reader

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when a signal arrives."""
        return self._reader.fileno()

    def take(self) -> list[int]:
        """Return the signals that arrived since the last call, in their order."""
        try:
            return list(self._reader.recv(4096))
        except BlockingIOError:
            return []


@contextlib.contextmanager
def open_signal_inbox(numbers: Sequence[int]) -> Iterator[SignalInbox]:
    """Collect the signals for as long as the context lasts, then restore what was.

    A signal that is ignored on entry stays ignored, as ``nohup`` and shells want it. Main thread
    only (a rule of Python's).
    """
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    previous = {}
    previous_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, lambda *_: None)
        yield SignalInbox(reader)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_descriptor)
        reader.close()
        writer.close()
