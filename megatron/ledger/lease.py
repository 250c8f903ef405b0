"""One job at a time writes to a save directory: it holds a lease, and shows that it lives.

    <save>/
      lock.json          who writes here, and a count that the holder raises in place: a heartbeat
      .lease-<token>/    the holder's home, where lock.json was prepared and goes when released

A lease is over when its process is known to be gone (same machine), when SLURM says that its job
is, or when somebody who wants it has seen no heartbeat for 90 seconds, by their own clock. A holder
that was only paused, or cut off from the file system, lives on without knowing. It can't harm:

* Who takes a lease over first moves the former holder's home into its own. Only one taker can, and
  from then on the former holder has no place to rename ``lock.json`` to.
* Its heartbeats go to its own file, which no longer has a name.
* Before anything becomes visible a writer prepares it, looks at ``lock.json`` again, and renames
  it; a new holder takes away all that is prepared (``run_directory.remove_leftovers``).
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron.base.atomic_files import fsync_directory
from megatron.base.errors import RunDirectoryError
from megatron.base.file_digests import FileDigest
from megatron.base.processes import ProcessIdentity
from megatron.base.write_points import reach
from megatron.ledger.slurm_jobs import SlurmJob

__all__ = ["LEASE_TIMEOUT_S", "Lease", "LeaseHolder"]

logger = logging.getLogger(__name__)

LEASE_TIMEOUT_S = 90.0
HEARTBEAT_INTERVAL_S = 10.0

_NAME = "lock.json"
_HOME = ".lease-"
_TOKEN = re.compile(r"[0-9a-f]{12,32}")
_COUNT_DIGITS = 12
_TAIL = '"}\n'  # what follows the heartbeat's digits


@dataclass(frozen=True)
class LeaseHolder:
    """The process that writes to a save directory."""

    process: ProcessIdentity
    job: SlurmJob | None
    started: float  # seconds since the epoch, when it asked for the lease
    token: str  # unique to this holding

    @classmethod
    def of_this_process(cls, environ: Mapping[str, str], now: float) -> Self:
        """Return who is asking."""
        job = SlurmJob.of_environment(environ)
        return cls(ProcessIdentity.of_this_process(), job, now, uuid.uuid4().hex)

    def __str__(self) -> str:
        job = f" (SLURM job {self.job.job_id})" if self.job is not None else ""
        return f"process {self.process.pid} on {self.process.host}{job}"


class Lease:
    """A held lease; release it, or use it as a context manager.

    Example:
        >>> import tempfile
        >>> save = Path(tempfile.mkdtemp())
        >>> with Lease.acquire(save) as lease:
        ...     lease.still_held()
        True
        >>> list(save.iterdir()), lease.still_held()
        ([], False)
    """

    def __init__(self, save: Path, holder: LeaseHolder, descriptor: int) -> None:
        self.path = save / _NAME
        self.holder = holder
        self._home = _home(save, holder.token)
        self._descriptor = descriptor  # of the file itself, whatever lock.json names later
        self._count = 0
        self._stop = threading.Event()
        self._heartbeat: threading.Thread | None = None
        self._is_lost = False

    @classmethod
    def acquire(
        cls,
        save: Path,
        *,
        timeout_s: float = LEASE_TIMEOUT_S,
        tell: Callable[[str], None] = logger.warning,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
    ) -> Self:
        """Take the lease of ``save``, which is created if missing.

        If its holder may live but isn't known to, this waits for a heartbeat, or ``timeout_s``.

        Args:
            save: the save directory.
            timeout_s: so long without a heartbeat, a holder is taken for gone.
            tell: told what is waited for, and what was taken over.
            environ: names the SLURM job of this process.
            clock: seconds that only go forward.
            sleep: waits so many seconds.
            now: seconds since the epoch.

        Raises:
            RunDirectoryError: another job holds it, or it cannot be written.
        """
        holder = LeaseHolder.of_this_process(environ, now())
        observer = _Observer(save, holder, timeout_s, tell, clock, now)
        try:
            save.mkdir(parents=True, exist_ok=True)
            while True:
                if observer.is_free():
                    descriptor = _take(save, holder, observer)
                    if descriptor is not None:
                        return cls(save, holder, descriptor)
                sleep(min(1.0, timeout_s / 20))
        except OSError as error:
            raise RunDirectoryError(
                f"{save / _NAME} cannot be read or written, so that nothing tells whether another "
                f"job saves there: {error}"
            ) from error

    def start_heartbeat(self, interval_s: float = HEARTBEAT_INTERVAL_S) -> None:
        """From now on show every ``interval_s`` seconds that this process lives, until released."""
        self._heartbeat = threading.Thread(
            target=self._beat, args=(interval_s,), name="lease heartbeat", daemon=True
        )
        self._heartbeat.start()

    @property
    def is_lost(self) -> bool:
        """Whether the heartbeat has found that somebody else holds the lease; costs nothing."""
        return self._is_lost

    def still_held(self) -> bool:
        """Whether ``lock.json`` names this holding; it is read anew."""
        return _is_held_by(self.path, self.holder.token)

    def require_held(self) -> None:
        """Find out that somebody else has taken the directory over.

        Raises:
            RunDirectoryError: says who.
            OSError: ``lock.json`` cannot be read.
        """
        other = _read(self.path)
        if other is not None and other.token == self.holder.token:
            return
        who = f"{other.holder} has taken it over" if other and other.holder else "its lock is gone"
        raise RunDirectoryError(
            f"{self.path.parent} is no longer this job's: {who}. This job was without a sign of "
            "life for too long (paused, or cut off from the file system), or somebody removed "
            f"{self.path}; what it was about to save is discarded"
        )

    def release(self) -> None:
        """Give the lease up; of another's nothing is touched."""
        self._stop.set()
        if self._heartbeat is not None:
            self._heartbeat.join()
        if self._descriptor < 0:
            return
        if self.still_held():
            # Whoever takes the lease over right now has moved this home: then the rename fails.
            with contextlib.suppress(OSError):
                self.path.rename(self._home / _NAME)
        shutil.rmtree(self._home, ignore_errors=True)
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _beat(self, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            self._count += 1
            digits = f"{self._count:0{_COUNT_DIGITS}d}".encode()
            try:
                # In place, so that a full disk doesn't end it.
                end = os.fstat(self._descriptor).st_size
                os.pwrite(self._descriptor, digits, end - len(_TAIL) - _COUNT_DIGITS)
                os.fdatasync(self._descriptor)
            except OSError as error:
                logger.debug("%s: no heartbeat: %s", self.path, error)
            try:
                sight = _read(self.path)
            except OSError as error:  # of the file server, perhaps: that takes nothing away
                logger.debug("%s cannot be read: %s", self.path, error)
                continue
            if sight is None or sight.token != self.holder.token:
                self._is_lost = True
                logger.warning("%s is no longer this job's", self.path.parent)
                return


@dataclass(frozen=True)
class _Sight:
    """``lock.json`` as it was seen."""

    text: str
    token: str
    holder: LeaseHolder | None  # None: unreadable; then the token is made of the text


@dataclass
class _Observer:
    """Somebody who wants a lease, and what they have seen of its holder."""

    save: Path
    asker: LeaseHolder
    timeout_s: float
    tell: Callable[[str], None]
    clock: Callable[[], float]
    now: Callable[[], float]
    first: _Sight | None = None
    since: float = 0.0
    claimants: dict[str, float] = field(default_factory=dict)  # token -> first seen

    def is_free(self) -> bool:
        """Look once; whether nobody holds the lease, or its holder is gone (``first``).

        Raises:
            RunDirectoryError: the holder lives.
            OSError: nothing tells; waiting would not help.
        """
        sight = _read(self.save / _NAME)
        if sight is None:
            self.first = None
            return True
        if self.first is not None and sight.text != self.first.text:
            self._refuse(sight)  # a heartbeat, or another holder
        if self.first is None:
            self.first, self.since = sight, self.clock()
            return self._is_gone_at_first_sight(sight)
        is_dead = sight.holder is not None and sight.holder.process.is_dead_here()
        return is_dead or self.clock() - self.since >= self.timeout_s

    def _is_gone_at_first_sight(self, sight: _Sight) -> bool:
        holder = sight.holder
        if holder is not None:
            if holder.process.is_running_here():
                self._refuse(sight)
            if holder.process.is_dead_here():
                self.tell(f"{self.save} was held by {holder}, which is gone: taking over")
                return True
            if holder.job is not None and holder.job.is_over(self.asker.job):
                self.since -= self.timeout_s
                self.tell(f"{self.save} was held by {holder}, whose job is over: taking over")
                return True
        self.tell(
            f"{self.save} is held by {holder or 'an unreadable lock'}; waiting up to "
            f"{self.timeout_s:.0f} s for a sign of life before taking over"
        )
        return False

    def has_seen_claimant(self, token: str) -> bool:
        """Whether another taker has been at it for so long that it must be gone."""
        since = self.claimants.setdefault(token, self.clock())
        return self.clock() - since >= self.timeout_s

    def _refuse(self, sight: _Sight) -> None:
        holder = sight.holder
        path = self.save / _NAME
        if holder is None:
            raise RunDirectoryError(
                f"{path} is not readable as a lock, and was changed a moment ago: another job "
                f"seems to use {self.save}"
            )
        minutes = max(0.0, self.now() - holder.started) / 60
        raise RunDirectoryError(
            f"{self.save} is in use by {holder}, for {minutes:.0f} minutes: two jobs must not save "
            "into one directory. Stop that job, or use another save; a job that is gone is noticed "
            "without help"
        )


def _take(save: Path, holder: LeaseHolder, observer: _Observer) -> int | None:
    """Try once; return the descriptor of our ``lock.json``, None if somebody was faster."""
    home = _home(save, holder.token)
    prepared = home / _NAME
    descriptor = -1
    is_taken = False
    try:
        home.mkdir(exist_ok=True)
        descriptor = _prepare(prepared, holder)
        reach("lease: prepared")
        if observer.first is None:
            is_taken = _link(prepared, save / _NAME)
        else:
            is_taken = _replace(prepared, save, observer.first, observer)
        if is_taken:
            fsync_directory(save)
            reach("lease: lock replaced")
            is_taken = _is_held_by(save / _NAME, holder.token)  # this may have taken long
    except FileNotFoundError:
        is_taken = False  # we were slow, or paused, and another taker took this home away
    finally:
        if not is_taken:
            if descriptor >= 0:
                os.close(descriptor)
            shutil.rmtree(home, ignore_errors=True)
    if not is_taken:
        return None
    reach("lease: taken")
    # Former holders, takers that were killed; a taker at work makes itself another home. A holder
    # that is no longer one finds its own moved away, and moves none.
    for other in save.glob(f"{_HOME}*"):
        if other != home:
            _move(other, home)
    for former in home.glob(f"{_HOME}*"):
        shutil.rmtree(former, ignore_errors=True)
    return descriptor


def _prepare(path: Path, holder: LeaseHolder) -> int:
    values = {**asdict(holder), "heartbeat": "0" * _COUNT_DIGITS}
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    os.write(descriptor, (json.dumps(values) + "\n").encode())
    os.fsync(descriptor)
    return descriptor


def _link(prepared: Path, path: Path) -> bool:
    """Take a free lease: a link can be made only if the name isn't there."""
    with contextlib.suppress(FileExistsError):
        os.link(prepared, path)
    # A file server may answer twice; the number of names is what counts.
    is_taken = prepared.stat().st_nlink == 2
    prepared.unlink()
    return is_taken


def _replace(prepared: Path, save: Path, former: _Sight, observer: _Observer) -> bool:
    """Take a lease whose holder is gone."""
    home = prepared.parent
    if not _claim(save, former.token, home, observer):
        return False
    sight = _read(save / _NAME)
    if sight is None or sight.text != former.text:
        # It lives after all, was released, or its successor was here and is done.
        for claimed in home.glob(f"{_HOME}*"):
            with contextlib.suppress(OSError):
                claimed.rename(save / claimed.name)
        return False
    reach("lease: former holder's home moved")
    prepared.rename(save / _NAME)
    return True


def _claim(save: Path, token: str, home: Path, observer: _Observer) -> bool:
    """Move the former holder's home into ours; of several takers one succeeds."""
    former = _home(save, token)
    if _move(former, home):
        return True
    claims = list(save.glob(f"{_HOME}*/{former.name}"))
    if not claims:
        if not _is_held_by(save / _NAME, token):
            return False  # a successor is done with it
        # It never had one, or somebody tidied up.
        with contextlib.suppress(FileExistsError):
            former.mkdir()
        return _move(former, home)
    # Another taker was faster. It has the lease within a moment, unless it is gone too.
    claimant = claims[0].parent
    sight = _read(claimant / _NAME)
    is_gone = sight is not None and sight.holder is not None and sight.holder.process.is_dead_here()
    if is_gone or observer.has_seen_claimant(claimant.name):
        return _move(claimant, home)
    return False


def _move(directory: Path, into: Path) -> bool:
    try:
        directory.rename(into / directory.name)
    except FileNotFoundError:
        return False
    return True


def _home(save: Path, token: str) -> Path:
    return save / f"{_HOME}{token}"


def _is_held_by(path: Path, token: str) -> bool:
    try:
        sight = _read(path)
    except OSError:
        return False
    return sight is not None and sight.token == token


def _read(path: Path) -> _Sight | None:
    """Return what a lock says; None if there is none.

    Raises:
        OSError: it cannot be read: it is another user's, say.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        data = path.read_bytes()  # NFS: it was replaced while it was read
    text = data.decode(errors="replace")
    try:
        values = json.loads(text)
        job = values["job"]
        holder = LeaseHolder(
            ProcessIdentity(**values["process"]),
            None if job is None else SlurmJob(**job),
            float(values["started"]),
            values["token"],
        )
        if not _TOKEN.fullmatch(holder.token):
            raise ValueError(f"{holder.token!r} is no token")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        digest = FileDigest()
        digest.update(text.encode())
        return _Sight(text, digest.hexdigest(), None)
    return _Sight(text, holder.token, holder)
