"""Which checkpoints ``keep_last_n_checkpoints`` lets go, and how they go.

Only committed checkpoints (those with a manifest) of the newest one's own lineage are deleted. What
a roll-back abandoned, what NeoX wrote, symbolic links and whatever else lies in ``save`` is left to
the user: that it is of no use anymore is not for a program to say.
"""

import logging
import shutil
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

from megatron.base.atomic_files import fsync_directory
from megatron.base.errors import CheckpointError
from megatron.base.write_points import reach
from megatron.ledger.manifest import Manifest, quick_problems, read_manifest
from megatron.ledger.readers import is_being_read
from megatron.ledger.run_directory import checkpoint_path, list_checkpoints, read_latest

__all__ = ["delete_expired", "expired"]

logger = logging.getLogger(__name__)

_DELETED = ".deleted-"


def expired(
    newest: Manifest,
    present: Collection[Manifest],
    *,
    keep_last_n: int,
    is_good: Callable[[Manifest], bool],
) -> list[Manifest]:
    """Return the ancestors of ``newest`` that are older than the last ``keep_last_n`` good ones.

    A damaged checkpoint takes no good one's place, so there are always ``keep_last_n`` to go back
    to if there ever were. Where a parent is missing the lineage is not followed further.

    Args:
        newest: the checkpoint just committed.
        present: all committed checkpoints of the directory.
        keep_last_n: so many stay, at least 1.
        is_good: whether a checkpoint could be loaded; asked of the newest ones only.

    Example:
        >>> def commit(sequence, parent):
        ...     return Manifest(
        ...         sequence=sequence,
        ...         step=10 * sequence,
        ...         run_id="r",
        ...         attempt=1,
        ...         parent=parent,
        ...         files={},
        ...     )
        >>> present = [commit(1, None), commit(2, 1), commit(3, 2), commit(4, 2)]  # 3: abandoned
        >>> gone = expired(present[-1], present, keep_last_n=2, is_good=lambda manifest: True)
        >>> [manifest.step for manifest in gone]
        [10]
    """
    if keep_last_n < 1:
        raise ValueError(f"keep_last_n must be at least 1, got {keep_last_n}")
    num_good = 0
    lineage = _lineage(newest, present)
    for age, manifest in enumerate(lineage):
        num_good += is_good(manifest)
        if num_good == keep_last_n:
            return lineage[age + 1 :]
    return []


def delete_expired(
    save: Path,
    keep_last_n: int,
    newest: Manifest,
    *,
    may_write: Callable[[], bool] = lambda: True,
) -> list[int]:
    """Delete what :func:`expired` names directly under ``save``, unless somebody reads it.

    A directory loses its name before its files, so a kill never leaves half a checkpoint. What
    cannot be deleted is logged and stays with what came after it, until a later save: only disk
    space is at stake.

    Args:
        save: the save directory.
        keep_last_n: so many checkpoints stay, at least 1.
        newest: the checkpoint just committed, to which ``latest`` points.
        may_write: whether this process still holds ``save``; asked before every deletion.

    Returns:
        The steps whose checkpoints are gone, oldest first.
    """
    try:
        if read_latest(save) != newest.step:
            return []  # somebody else has committed since: what to keep is theirs to say
        present = _committed(save)
    except (CheckpointError, OSError) as error:
        logger.warning("keep_last_n_checkpoints: nothing is deleted: %s", error)
        return []
    gone = []
    candidates = expired(
        newest,
        present,
        keep_last_n=keep_last_n,
        is_good=lambda manifest: not quick_problems(checkpoint_path(save, manifest.step), manifest),
    )
    # Oldest first, up to one that has to stay: without its descendants no lineage would lead to it.
    for manifest in reversed(candidates):
        if not may_write() or not _delete(checkpoint_path(save, manifest.step)):
            break
        gone.append(manifest.step)
    return gone


def _lineage(newest: Manifest, present: Collection[Manifest]) -> list[Manifest]:
    """Return ``newest`` and its ancestors, newest first."""
    by_sequence = {manifest.sequence: manifest for manifest in present}
    lineage = [newest]
    while (parent := lineage[-1].parent) is not None:
        manifest = by_sequence.get(parent)
        # An ancestor was committed earlier; anything else is a copied or edited manifest.
        if manifest is None or manifest.sequence >= lineage[-1].sequence:
            break
        lineage.append(manifest)
    return lineage


def _committed(save: Path) -> list[Manifest]:
    """Return the manifests of the checkpoints in ``save``, as far as they can be read."""
    manifests = []
    for step in list_checkpoints(save):
        checkpoint = checkpoint_path(save, step)
        if checkpoint.is_symlink():
            continue  # what it points to is not ours
        try:
            manifest = read_manifest(checkpoint)
        except CheckpointError as error:
            logger.warning("keep_last_n_checkpoints leaves a damaged checkpoint alone: %s", error)
            continue
        if manifest is not None and manifest.step == step:
            manifests.append(manifest)
    return manifests


def _delete(checkpoint: Path) -> bool:
    """Delete a checkpoint that nobody reads; return whether it is gone."""
    try:
        if is_being_read(checkpoint):
            logger.info("%s has expired, but is being read: it stays for now", checkpoint)
            return False
        hidden = checkpoint.with_name(f"{_DELETED}{checkpoint.name}-{uuid.uuid4().hex[:12]}")
        checkpoint.rename(hidden)
        if is_being_read(checkpoint):  # since we looked; that reader may have seen it yet
            hidden.rename(checkpoint)
            return False
    except OSError as error:
        logger.warning("keep_last_n_checkpoints cannot delete %s: %s", checkpoint, error)
        return False
    reach("retention: checkpoint hidden")
    try:
        fsync_directory(checkpoint.parent)
        shutil.rmtree(hidden)
    except OSError as error:
        # Its name is gone; the next launch takes the rest away.
        logger.warning("%s is not deleted completely: %s", hidden, error)
        return True
    reach("retention: checkpoint deleted")
    return True
