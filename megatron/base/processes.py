"""Which process: a machine, a pid, and when it started there, so that a reused pid is told apart.

Pids can be compared by processes that run under one kernel and see the same pids. Host names don't
say so much: containers and badly installed machines share them.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

__all__ = ["ProcessIdentity"]

_ZOMBIE = -1


@dataclass(frozen=True)
class ProcessIdentity:
    """A process on some machine."""

    host: str
    pid: int
    start: int  # clock ticks after boot; 0 where that cannot be seen
    boot: str = ""  # of the machine; empty where that cannot be seen
    pid_namespace: str = ""

    @classmethod
    def of_this_process(cls) -> Self:
        """Return who is asking."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _start_of(pid) or 0, _boot(), _pid_namespace())

    def is_of_here(self) -> bool:
        """Whether its pid means the same to this process."""
        here = (socket.gethostname(), _boot(), _pid_namespace())
        return (self.host, self.boot, self.pid_namespace) == here

    def is_dead_here(self) -> bool:
        """Whether it ran on this machine and is gone; of another machine nothing is known here.

        Example:
            >>> ProcessIdentity.of_this_process().is_dead_here()
            False
            >>> ProcessIdentity("elsewhere", 1, 0).is_dead_here()
            False
        """
        if not self.is_of_here():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # somebody else's process: it runs
        start = _start_of(self.pid)
        return start == _ZOMBIE or (start is not None and self.start not in (0, start))

    def is_running_here(self) -> bool:
        """Whether it is on this machine, alive, and not stopped by a signal or a debugger."""
        return self.is_of_here() and not self.is_dead_here() and _state_of(self.pid) not in "Tt"


def _start_of(pid: int) -> int | None:
    """Return when ``pid`` started, or that only its entry is left; None if that cannot be seen."""
    fields = _status_fields(pid)
    if fields is None:
        return None
    return _ZOMBIE if fields[0] in ("Z", "X") else int(fields[19])


def _state_of(pid: int) -> str:
    """Return the letter of a process's state; "?" if that cannot be seen."""
    fields = _status_fields(pid)
    return "?" if fields is None else fields[0]


def _status_fields(pid: int) -> list[str] | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command in parentheses may hold anything; the fields after it are counted from the state.
    return stat.rpartition(")")[2].split()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
