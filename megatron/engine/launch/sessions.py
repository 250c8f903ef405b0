"""Ends everything a rank started, also when the launcher itself is killed.

Every rank leads a session of its own, and what it starts (data workers, tokenizers) stays in it
unless it asks for another one, as W&B's uploader does, which ends by itself. A *guard* is a process
in yet another session. It learns the ranks' sessions through a pipe whose other end only the
launcher holds: when the pipe closes without a farewell, the launcher is gone, and the guard ends
the sessions.

The guard is this file, run as a script without site packages: 15 ms, 8 MB. So it may import
nothing but the standard library.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from types import TracebackType

__all__ = ["SessionGuard", "end_sessions", "kill_sessions", "session_members"]

_FAREWELL = b"done\n"
_POLL_S = 0.02
_LINGER_S = 1.0
_KILL_LIMIT_S = 10.0


def session_members(sessions: Collection[int]) -> list[int]:
    """Return the living processes (no zombies) of the sessions, by process id."""
    members = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                stat = file.read()
        except OSError:
            continue  # ended since the listing
        # After the program's name, which is in parentheses and may contain anything:
        # state, parent, process group, session.
        state, _, _, session = stat[stat.rindex(b")") + 2 :].split()[:4]
        if int(session) in sessions and state not in (b"Z", b"X"):
            members.append(int(entry))
    return members


def kill_sessions(sessions: Collection[int], limit_s: float = _KILL_LIMIT_S) -> list[int]:
    """SIGKILL the sessions until they are empty; return who could not be killed in ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while members := session_members(sessions):
        if time.monotonic() > deadline:
            break
        _signal_all(members, signal.SIGKILL)
        time.sleep(_POLL_S)
    return members


def end_sessions(sessions: Collection[int], grace_s: float) -> list[int]:
    """Wait for what is about to end anyway, then SIGTERM, then SIGKILL after ``grace_s``.

    Returns:
        The processes that had to be told to end.
    """
    told = _wait_until_empty(sessions, _LINGER_S)
    if told:
        _signal_all(told, signal.SIGTERM)
        _wait_until_empty(sessions, grace_s)
        kill_sessions(sessions)
    return told


class SessionGuard:
    """Ends the sessions it watches if this process dies; a context manager."""

    def __enter__(self) -> "SessionGuard":
        reader, self._pipe = os.pipe()  # neither end is inherited by the ranks
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=reader,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # out of reach of a signal to the launcher's process group
        )
        os.close(reader)
        return self

    def watch(self, session: int) -> None:
        """Add a session, by its leader's process id."""
        self._send(b"%d\n" % session)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._send(_FAREWELL)
        os.close(self._pipe)
        self._process.wait()

    def _send(self, line: bytes) -> None:
        # A guard that somebody killed is no reason to stop training.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, line)


def _wait_until_empty(sessions: Collection[int], limit_s: float) -> list[int]:
    deadline = time.monotonic() + limit_s
    while (members := session_members(sessions)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return members


def _signal_all(processes: Collection[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _guard() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    sessions = set()
    for line in sys.stdin.buffer:
        if line == _FAREWELL:
            return
        sessions.add(int(line))
    if session_members(sessions):
        kill_sessions(sessions)
        with contextlib.suppress(OSError):
            sys.stderr.write("deepy: the launcher was killed; its ranks were ended too\n")


if __name__ == "__main__":
    _guard()
