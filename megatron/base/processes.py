"""Which process: a host, a pid, and when it started there, so that a reused pid is told apart."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

__all__ = ["ProcessIdentity"]


@dataclass(frozen=True)
class ProcessIdentity:
    """A process on some machine."""

    host: str
    pid: int
    start: int  # clock ticks after boot; 0 where that cannot be seen

    @classmethod
    def of_this_process(cls) -> Self:
        """Return who is asking."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _start_of(pid) or 0)

    def is_dead_here(self) -> bool:
        """Whether it ran on this machine and is gone; of another machine nothing is known here.

        Example:
            >>> ProcessIdentity.of_this_process().is_dead_here()
            False
            >>> ProcessIdentity("elsewhere", 1, 0).is_dead_here()
            False
        """
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # somebody else's process: it runs
        return _start_of(self.pid) not in (self.start, None)


def _start_of(pid: int) -> int | None:
    """Return when ``pid`` started; -1 for a zombie, None if that cannot be seen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command in parentheses may hold anything; the fields after it are counted from the state.
    fields = stat.rpartition(")")[2].split()
    return -1 if fields[0] == "Z" else int(fields[19])
