"""What a conversion has written, and its end."""

from dataclasses import dataclass
from pathlib import Path

from megatron.base.atomic_files import fsync_directory
from megatron.base.file_digests import digest_file
from megatron.ledger.manifest import Manifest, StoredFile, write_manifest

__all__ = ["Converted", "seal_checkpoint"]


@dataclass(frozen=True)
class Converted:
    """A model in another form."""

    path: Path
    num_files: int
    num_bytes: int
    notices: tuple[str, ...]  # what a user should know


def seal_checkpoint(directory: Path, step: int, files: dict[str, StoredFile]) -> None:
    """Write the manifest of all files of a checkpoint.

    Args:
        directory: the checkpoint.
        step: that it is of.
        files: what is known of files written; the others are read for their digests and added.
    """
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in files:
            files[name] = StoredFile(path.stat().st_size, digest_file(path))
    manifest = Manifest(sequence=1, step=step, run_id=None, attempt=None, parent=None, files=files)
    write_manifest(directory, manifest)
    fsync_directory(directory)
