"""Marks of processes that read a checkpoint, so that nobody deletes it meanwhile.

    <save>/.reading-global_stepN-<token>.json    who reads; touched every minute while reading

Reader and deleter need no lock between them: a reader leaves its mark and then looks whether the
checkpoint is there, a deleter takes the checkpoint's name away and then looks for marks.

A mark counts until its process is known to be gone: on this machine by its pid, from elsewhere when
it wasn't touched for ten minutes by the clock of the file system they share.
"""

import contextlib
import json
import logging
import os
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from megatron.base.errors import CheckpointError
from megatron.base.processes import ProcessIdentity
from megatron.base.regular_files import read_small_text

__all__ = ["is_being_read", "reading", "remove_dead_marks"]

logger = logging.getLogger(__name__)

_PREFIX, _SUFFIX = ".reading-", ".json"
_TOUCH_INTERVAL_S = 60.0
_AGE_LIMIT_S = 600.0
_MARK_BYTES = 1000  # at most; a few names and numbers


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Keep ``checkpoint`` from being deleted while the block runs.

    Of the processes of one job, one is enough. Where no mark can be left (a read-only directory,
    a full disk) the block runs without one: such a checkpoint is as safe as whoever may write there
    makes it.

    Raises:
        CheckpointError: there is no such checkpoint, or it was deleted a moment ago.
    """
    mark = checkpoint.parent / f"{_PREFIX}{checkpoint.name}-{uuid.uuid4().hex[:12]}{_SUFFIX}"
    is_marked = _leave(mark)
    stop = threading.Event()
    toucher = threading.Thread(target=_touch, args=(mark, stop), name="reader mark", daemon=True)
    try:
        if not checkpoint.is_dir():
            raise CheckpointError(
                f"{checkpoint} is not there (any more); was it deleted by keep_last_n_checkpoints?"
            )
        if is_marked:
            toucher.start()
        yield
    finally:
        stop.set()
        if toucher.is_alive():
            toucher.join()
        if is_marked:
            with contextlib.suppress(OSError):
                mark.unlink()


def is_being_read(checkpoint: Path) -> bool:
    """Whether a living process has marked ``checkpoint``; marks of dead ones are removed.

    Raises:
        OSError: the directory cannot be read.
    """
    return checkpoint.name in remove_dead_marks(checkpoint.parent)


def remove_dead_marks(save: Path) -> set[str]:
    """Remove the marks of processes that are gone; return the names of what the others read.

    Raises:
        OSError: the directory cannot be read.
    """
    marks = list(save.glob(f"{_PREFIX}*{_SUFFIX}"))
    if not marks:
        return set()
    now = _file_system_time(save)
    being_read = set()
    for mark in marks:
        if _counts(mark, now):
            being_read.add(mark.name.removeprefix(_PREFIX).rpartition("-")[0])
        else:
            with contextlib.suppress(OSError):
                mark.unlink()
    return being_read


def _leave(mark: Path) -> bool:
    """Write a mark; return whether that was possible."""
    content = json.dumps(asdict(ProcessIdentity.of_this_process())) + "\n"
    try:
        # The name is unique and an incomplete mark counts like a whole one: no rename is needed.
        mark.write_text(content)
    except OSError as error:
        logger.debug("%s could not be written: %s", mark, error)
        with contextlib.suppress(OSError):
            mark.unlink()
        return False
    return True


def _touch(mark: Path, stop: threading.Event) -> None:
    while not stop.wait(_TOUCH_INTERVAL_S):
        try:
            os.utime(mark)
        except FileNotFoundError:  # this process was suspended for long, and taken for dead
            _leave(mark)
        except OSError as error:
            logger.debug("%s could not be touched: %s", mark, error)


def _counts(mark: Path, now: float) -> bool:
    try:
        age = now - mark.lstat().st_mtime
    except OSError:
        return False  # its reader has just finished
    try:
        reader = ProcessIdentity(**json.loads(read_small_text(mark, limit_bytes=_MARK_BYTES)))
        if reader.is_dead_here():
            return False
    except (CheckpointError, ValueError, TypeError):
        pass  # being written, or of another release: its age decides
    return age < _AGE_LIMIT_S


def _file_system_time(directory: Path) -> float:
    """Return the time that ``directory``'s file system gives files now.

    Machines' clocks may differ by more than a mark's age limit; a file server has one.
    """
    with tempfile.TemporaryFile(dir=directory, prefix=".clock-") as file:  # has no name, on Linux
        file.write(b"?")
        file.flush()
        return os.fstat(file.fileno()).st_mtime
