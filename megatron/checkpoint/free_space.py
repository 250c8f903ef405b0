"""Whether a checkpoint will find room, as far as a file system tells."""

import os
from pathlib import Path

from megatron.base.errors import CheckpointError

__all__ = ["require_free_space"]

_FOR_THE_RECORD_BYTES = 1 << 20  # lines and facts of the run that go on growing


def require_free_space(directory: Path, num_bytes: int, *, what: str) -> None:
    """Check that ``num_bytes`` more fit under ``directory``.

    A quota, or somebody else's files a moment later, may still be in the way.

    Args:
        directory: an existing directory.
        num_bytes: to be written.
        what: is to be written, for the message.

    Raises:
        CheckpointError: they don't fit.
    """
    try:
        system = os.statvfs(directory)
    except OSError:
        return  # whoever writes will hear why
    if not system.f_blocks:
        return  # some file systems don't count
    blocks = system.f_bfree if os.geteuid() == 0 else system.f_bavail
    free = blocks * system.f_frsize
    if num_bytes + _FOR_THE_RECORD_BYTES > free:
        raise CheckpointError(
            f"{what} needs {num_bytes / 1e6:.1f} MB, but {directory} has only {free / 1e6:.1f} MB "
            f"free, and {_FOR_THE_RECORD_BYTES / 1e6:.1f} MB of that are left to the run's record; "
            "make room there (keep_last_n_checkpoints deletes old checkpoints)"
        )
