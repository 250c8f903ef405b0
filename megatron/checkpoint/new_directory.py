"""Directories that get their name when everything is in them."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from megatron.base.atomic_files import fsync_directory
from megatron.base.errors import CheckpointError

__all__ = ["new_directory"]


@contextlib.contextmanager
def new_directory(destination: Path, work: str) -> Iterator[Path]:
    """Yield a hidden directory beside ``destination`` that becomes it if nothing is raised.

    A kill leaves it behind under its hidden name, ``.NAME.WORK-…``, which says what it is.

    Args:
        destination: must not exist.
        work: what is done there, in a word.

    Raises:
        CheckpointError: there is something already, or the disk refused.
    """
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists already; name a directory that doesn't")
    temporary = destination.parent / f".{destination.name}.{work}-{uuid.uuid4().hex[:12]}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        fsync_directory(temporary)
        os.rename(temporary, destination)
        fsync_directory(destination.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{destination} could not be written: {error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
