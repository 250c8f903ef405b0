"""Copies of committed checkpoints in object storage (``s3_path``), through s3fs.

    <s3_path>/<name of save>/global_stepN/<file>     as below <save>/global_stepN/

The order of a commit is kept: ``manifest.json`` comes last, so a copy that has one is complete. A
copy is made from files that are already committed and only reads them. NeoX's layout; like NeoX's,
it has no ``latest``.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.base.errors import CheckpointError
from megatron.base.exit_codes import FAILED
from megatron.base.write_points import reach
from megatron.ledger.manifest import MANIFEST_FILE, Manifest

__all__ = ["copy_checkpoint", "remote_place", "require_writable"]

logger = logging.getLogger(__name__)

_MAX_PARTS = 10_000  # of one object, S3's limit
_PATIENCE_S = 600.0  # for one request of a copy, and as long as its bytes take at
_SLOWEST_BYTES_PER_S = 1 << 20
_PATIENCE_AT_START_S = 60.0
_PROBE = ".write-check"  # an empty object, beside the checkpoints
_BYTES_IN_FLIGHT = 256 << 20  # of parts held in memory, unless a single part is larger


def remote_place(checkpoint: Path, s3_path: str, save_name: str) -> str:
    """Return where the copy of ``checkpoint`` lies."""
    return f"{s3_path.rstrip('/')}/{save_name}/{checkpoint.name}"


def copy_checkpoint(
    checkpoint: Path,
    manifest: Manifest,
    s3_path: str,
    save_name: str,
    chunk_size: int,
    *,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Copy a committed checkpoint; an older copy of the same step is replaced.

    Credentials, endpoint and the number of attempts are the environment's: ``AWS_PROFILE``,
    ``AWS_ENDPOINT_URL``, ``AWS_MAX_ATTEMPTS`` and so on. What is worth a retry is retried by
    botocore and s3fs.

    Args:
        checkpoint: its directory.
        manifest: what is in it.
        s3_path: ``s3://bucket`` or ``s3://bucket/prefix``.
        save_name: last part of the save directory's path.
        chunk_size: bytes of a part; a file of two or more is sent in parts.
        is_cancelled: asked after every part and file; True ends the copy with the error below.

    Raises:
        CheckpointError: it could not be copied completely; the copy then has no manifest, and
            the checkpoint itself is as it was.
    """
    target = remote_place(checkpoint, s3_path, save_name)
    try:
        with _storage(_PATIENCE_S, chunk_size, is_cancelled) as storage:
            _copy(checkpoint, manifest, target, storage)
    # s3fs, botocore and the HTTP client below each have errors of their own, without a common root.
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint} is saved, but its copy {target} is not complete: "
            f"{type(error).__name__}: {error}. It has no {MANIFEST_FILE}; "
            "copy the files again, that one last"
        ) from error


def require_writable(s3_path: str, save_name: str) -> None:
    """Find out before a model is trained whether its checkpoints can be copied.

    What a copy needs is tried: an empty object is written, listed and deleted.

    Args:
        s3_path: see :func:`copy_checkpoint`.
        save_name: last part of the save directory's path.

    Raises:
        CheckpointError: it can't. Its status tells whether that may pass (the server doesn't
            answer), or the user has to change something.
    """
    place = f"{s3_path.rstrip('/')}/{save_name}"
    try:
        with _storage(_PATIENCE_AT_START_S) as storage:
            storage.write(f"{place}/{_PROBE}")
            storage.sizes(place)
            storage.remove(f"{place}/{_PROBE}")
    except Exception as error:  # see above
        problem = CheckpointError(
            f"s3_path: checkpoints can't be copied to {place}: {type(error).__name__}: {error}. "
            "Bucket, credentials and server are those of the environment (AWS_PROFILE, "
            "AWS_ENDPOINT_URL, …) on the machine of rank 0"
        )
        if not isinstance(error, PermissionError | FileNotFoundError | ImportError | ValueError):
            problem.exit_code = FAILED
        raise problem from error


def _copy(checkpoint: Path, manifest: Manifest, target: str, storage: "_Storage") -> None:
    # Until the new manifest is there, what lies there must not look complete.
    old = set(storage.sizes(target)) - set(manifest.files)
    for name in sorted(old, key=lambda name: name != MANIFEST_FILE):
        storage.remove(f"{target}/{name}")
    for name in sorted(manifest.files):
        storage.send(checkpoint / name, f"{target}/{name}")
        reach("remote copy: file sent")
    arrived = storage.sizes(target)
    expected = {name: file.size for name, file in manifest.files.items()}
    if arrived != expected:
        names = sorted({name for name, _ in arrived.items() ^ expected.items()})
        raise OSError(f"other files arrived than were sent: {', '.join(names)}")
    storage.send(checkpoint / MANIFEST_FILE, f"{target}/{MANIFEST_FILE}")
    reach("remote copy: manifest sent")
    logger.info("%s is copied to %s", checkpoint, target)


@dataclass(frozen=True)
class _Storage:
    """Objects by their address, through one connection."""

    remote: Any  # s3fs.S3FileSystem
    patience_s: float  # for one request
    part_size: int
    callback: Any  # fsspec's: told of progress

    def send(self, path: Path, target: str) -> None:
        size = path.stat().st_size
        part_size = max(self.part_size, math.ceil(size / _MAX_PARTS))
        self.remote.put_file(
            str(path),
            target,
            callback=self.callback,
            chunksize=part_size,
            max_concurrency=max(1, _BYTES_IN_FLIGHT // part_size),
            # A server that takes a connection and never answers would be waited for for ever.
            timeout=self.patience_s + size / _SLOWEST_BYTES_PER_S,
        )

    def write(self, target: str, content: bytes = b"") -> None:
        self.remote.pipe_file(target, content, timeout=self.patience_s)

    def remove(self, target: str) -> None:
        self.remote.rm_file(target, timeout=self.patience_s)

    def sizes(self, target: str) -> dict[str, int]:
        """Return name below ``target`` -> bytes of the objects there."""
        root = target.partition("://")[2] + "/"
        found = self.remote.find(root, detail=True, timeout=self.patience_s)
        return {name.removeprefix(root): entry["size"] for name, entry in found.items()}


@contextmanager
def _storage(
    patience_s: float, part_size: int = 0, is_cancelled: Callable[[], bool] = lambda: False
) -> Iterator[_Storage]:
    import s3fs
    from fsspec.callbacks import Callback

    class StopsWhenCancelled(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            if is_cancelled():
                raise InterruptedError("it was given up")

    # An instance of its own: it is used on one thread, and forgotten with its connections.
    remote = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    try:
        yield _Storage(remote, patience_s, part_size, StopsWhenCancelled())
    finally:
        if remote._s3 is not None:
            remote.close_session(remote.loop, remote._s3)
