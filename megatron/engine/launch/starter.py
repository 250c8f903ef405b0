"""pdsh, srun or mpirun at work."""

import subprocess

from megatron.base.errors import LaunchError
from megatron.engine.launch.rank_process import Exit
from megatron.engine.launch.remote_start import RemoteStart
from megatron.engine.launch.sessions import kill_sessions

__all__ = ["Starter"]

_ENDS_WITHIN_S = 5.0


class Starter:
    """What has started the agents. It leads a session, out of reach of the terminal's Ctrl-C."""

    def __init__(self, remote_start: RemoteStart) -> None:
        self.program = remote_start.program
        try:
            self._process = subprocess.Popen(
                remote_start.command,
                env=remote_start.environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"{remote_start.program} can't be started: {error}") from error

    @property
    def pid(self) -> int:
        """Process id, and the id of the session it leads."""
        return self._process.pid

    @property
    def exit(self) -> Exit | None:
        """How it ended; None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        return Exit(None, -status) if status < 0 else Exit(status)

    def end(self) -> None:
        """Wait for its end, or else end it and what it started here."""
        try:
            self._process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            kill_sessions({self.pid})
            self._process.wait()
