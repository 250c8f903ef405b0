"""One job at a time on a save directory.

The lock is ``<save>/lock.json``: who holds it. It is created by a hard link, which fails if the
name exists, on any file system that several machines share. A lock whose process has died on this
very machine is taken over at once; one from another machine is never judged from here.
"""

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron.base.errors import RunDirectoryError

__all__ = ["LockHolder", "SaveLock"]

_NAME = "lock.json"
_GUARD = ".lock-guard"


@dataclass(frozen=True)
class LockHolder:
    """The process that holds a save directory."""

    host: str
    pid: int
    process_start: int  # clock ticks after boot, from /proc: tells a reused pid from the holder's
    started: float  # seconds since the epoch, when the lock was taken
    token: str  # unique to this holding

    def is_dead_here(self) -> bool:
        """Whether the holder ran on this machine and is gone."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # somebody else's process: it runs
        return _process_start(self.pid) not in (self.process_start, None)


class SaveLock:
    """A held lock; release it, or use it as a context manager.

    Example:
        >>> import tempfile
        >>> save = Path(tempfile.mkdtemp())
        >>> with SaveLock.acquire(save) as lock:
        ...     (save / "lock.json").exists()
        True
        >>> (save / "lock.json").exists()
        False
    """

    def __init__(self, path: Path, holder: LockHolder) -> None:
        self.path = path
        self.holder = holder

    @classmethod
    def acquire(cls, save: Path, *, now: float | None = None) -> Self:
        """Take the lock of ``save``, which is created if missing.

        Args:
            save: the save directory.
            now: seconds since the epoch, the clock's if None.

        Raises:
            RunDirectoryError: another job holds it, or it cannot be written.
        """
        pid = os.getpid()
        now = time.time() if now is None else now
        holder = LockHolder(
            socket.gethostname(), pid, _process_start(pid) or 0, now, uuid.uuid4().hex
        )
        path = save / _NAME
        try:
            save.mkdir(parents=True, exist_ok=True)
            prepared = save / f".{_NAME}.{holder.token}"
            prepared.write_text(json.dumps(asdict(holder)) + "\n")
            try:
                with _guarded(save):
                    _place(prepared, path, now)
            finally:
                prepared.unlink(missing_ok=True)
        except OSError as error:
            raise RunDirectoryError(f"{path} cannot be written: {error}") from error
        return cls(path, holder)

    def release(self) -> None:
        """Give the lock up; does nothing if it is no longer ours."""
        if _read(self.path) == self.holder:
            self.path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def _place(prepared: Path, path: Path, now: float) -> None:
    for _ in range(3):  # again if the holder released it between our two looks
        try:
            os.link(prepared, path)
            return
        except FileExistsError:
            holder = _read(path)
        if holder is not None or path.exists():
            break
    if holder is not None and holder.is_dead_here():
        # Replaced rather than removed: a job on another machine never finds the name free.
        os.replace(prepared, path)
        return
    if holder is None:
        raise RunDirectoryError(
            f"{path} is not readable as a lock; if no job is using {path.parent}, remove that file"
        )
    minutes = max(0.0, now - holder.started) / 60
    raise RunDirectoryError(
        f"{path.parent} is in use by process {holder.pid} on {holder.host}, for {minutes:.0f} "
        f"minutes: two jobs must not save into one directory. Stop that job, or use another save; "
        f"if it is certainly gone, remove {path}"
    )


def _read(path: Path) -> LockHolder | None:
    try:
        content = json.loads(path.read_text())
        return LockHolder(**content)
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def _guarded(save: Path) -> Iterator[None]:
    """Let processes of this machine look at the lock and take it over one after the other."""
    with open(save / _GUARD, "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _process_start(pid: int) -> int | None:
    """Return when ``pid`` started, in clock ticks after boot; -1 for a zombie, None if hidden."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command in parentheses may hold anything; the fields after it are counted from the state.
    fields = stat.rpartition(")")[2].split()
    return -1 if fields[0] == "Z" else int(fields[19])
