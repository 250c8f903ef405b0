"""One rank: a process that leads its own session and cannot outlive the launcher."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron.base.errors import LaunchError

__all__ = ["Exit", "RankProcess", "signal_name", "start_rank"]

_STDOUT = 1
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None, use_errno=True).prctl


@dataclass(frozen=True)
class Exit:
    """How a process ended."""

    code: int | None  # None when a signal ended it
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit code {self.code}"
        return f"killed by {signal_name(self.signal)}"

    @property
    def is_success(self) -> bool:
        """Whether the process ended by itself with status 0."""
        return self.code == 0

    @property
    def status(self) -> int:
        """The status a shell would give: the code, or 128 + the signal."""
        return 128 + self.signal if self.signal is not None else self.code or 0


class RankProcess:
    """A started rank. Its process id stays reserved until :meth:`reap`."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self.rank = rank
        self.exit: Exit | None = None
        self._process = process
        self.stdout = process.stdout  # None if it writes to ours
        assert process.stderr is not None  # noqa: S101 - start_rank asks for a pipe
        self.stderr = process.stderr

    @property
    def pid(self) -> int:
        """Process id, and the id of the session this rank leads."""
        return self._process.pid

    @property
    def has_failed(self) -> bool:
        """Whether the process is known to have ended, and not with status 0."""
        return self.exit is not None and not self.exit.is_success

    def check_exit(self) -> bool:
        """Look whether the process has ended by now; True if that is news.

        It is left a zombie, so that its id, which names its session too, can't be given to another
        process as long as we may still send signals to it.
        """
        if self.exit is not None:
            return False
        status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is None:
            return False
        if status.si_code == os.CLD_EXITED:
            self.exit = Exit(status.si_status)
        else:
            self.exit = Exit(None, status.si_status)
        return True

    def send(self, number: int) -> None:
        """Send a signal to the rank itself, not to what it started."""
        if self.exit is None:
            os.kill(self.pid, number)

    def reap(self) -> None:
        """Give the process id back. The process has ended."""
        self._process.wait()


def start_rank(
    rank: int, command: Sequence[str], environment: Mapping[str, str], *, is_foreground: bool
) -> RankProcess:
    """Start a rank.

    Args:
        is_foreground: it reads our standard input, and writes straight to our standard output if
            that is a terminal, so that prompts and progress bars work.

    Raises:
        LaunchError: the process can't be started.
    """
    try:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=None if is_foreground else subprocess.DEVNULL,
            stdout=None if is_foreground and os.isatty(_STDOUT) else subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            preexec_fn=_dies_with(os.getpid()),
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"rank {rank} cannot be started ({command[0]}): {error}") from error
    return RankProcess(rank, process)


def signal_name(number: int) -> str:
    """Return SIGTERM for 15, and something readable for numbers without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _dies_with(parent: int) -> Callable[[], None]:
    # Runs in the child between fork and exec: only what was made ready before the fork.
    def ask_for_death_signal() -> None:
        _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # the launcher died before we asked
            os._exit(1)

    return ask_for_death_signal
