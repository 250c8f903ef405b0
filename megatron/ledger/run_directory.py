"""The save directory: which checkpoints it holds, which one `latest` names, when one is due.

    <save>/
      latest                 the pointer NeoX and DeepSpeed read, replaced last and atomically
      global_stepN/          a checkpoint; a directory of this name is complete
      .tmp-global_stepN-…    one being written, or what a killed save left; `.replaced` in it, or in
                             global_stepN, is the checkpoint whose place it takes
      .deleted-global_stepN-…, .undone-global_stepN-…    on their way out
      attempts/, lock.json

A writer may lose `save` to another one and not know it yet: paused for minutes, or on a node that
was cut off. So every step of a commit takes something that only its writer has and renames it into
place; a new writer first renames or deletes all such things (:func:`remove_leftovers`), after which
the old one's renames fail and hurt nothing.

Nothing here opens a tensor file, so tools can ask without importing torch.
"""

import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

from megatron.base.atomic_files import fsync_directory, is_prepared_name, write_atomically
from megatron.base.errors import CheckpointError, RunDirectoryError
from megatron.base.regular_files import read_small_text
from megatron.base.write_points import reach

__all__ = [
    "checkpoint_path",
    "commit_checkpoint",
    "delete_replaced",
    "is_save_step",
    "list_checkpoints",
    "read_latest",
    "remove_leftovers",
    "step_of",
    "temporary_name",
    "temporary_path",
    "undo_checkpoint",
    "write_latest",
]

logger = logging.getLogger(__name__)

_LATEST = "latest"
_WRITING, _DELETED, _UNDONE = ".tmp-", ".deleted-", ".undone-"
_REPLACED = ".replaced"
_CHECKPOINT_NAME = re.compile(r"global_step(0|[1-9][0-9]*)")
_LATEST_LIMIT_BYTES = 4096


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` lies or would lie."""
    return directory / f"global_step{step}"


def step_of(name: str) -> int | None:
    """Return N if ``name`` is exactly ``global_stepN``, else None."""
    match = _CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def list_checkpoints(directory: Path) -> list[int]:
    """Return the steps whose ``global_stepN`` lies in ``directory``, ascending.

    ``global_step5_backup``, files and hidden names do not count; a missing directory has none.
    """
    if not directory.is_dir():
        return []
    steps = (step_of(entry.name) for entry in directory.iterdir() if entry.is_dir())
    return sorted(step for step in steps if step is not None)


def read_latest(directory: Path) -> int | None:
    """Return the step that ``latest`` names, None if there is no such file.

    Raises:
        CheckpointError: the file is empty, names no checkpoint, or one that is not there.
    """
    path = directory / _LATEST
    if not os.path.lexists(path):
        return None
    content = read_small_text(path, limit_bytes=_LATEST_LIMIT_BYTES).strip()
    step = step_of(content)
    if step is None:
        what = "is empty" if not content else f"holds {content[:80]!r}, not global_stepN"
        raise CheckpointError(f"{path} {what}")
    if not checkpoint_path(directory, step).is_dir():
        raise CheckpointError(f"{path} names {content}, which is not there")
    return step


def write_latest(
    directory: Path, step: int, *, before_rename: Callable[[], None] = lambda: None
) -> None:
    """Point ``latest`` at the checkpoint of ``step``; readers see the old pointer or the new.

    ``before_rename`` may still prevent it by an exception.
    """
    write_atomically(directory / _LATEST, f"global_step{step}", before_rename=before_rename)


def is_save_step(
    step: int,
    *,
    checkpoint_factor: float | None,
    checkpoint_scale: Literal["linear", "log"],
    extra_save_iters: Collection[int],
) -> bool:
    """Whether a checkpoint is due after ``step``.

    ``linear`` saves every ``checkpoint_factor`` steps, ``log`` at the integer parts of its powers
    (1, f, f², …). Step 0, the untrained model, is saved only if listed in ``extra_save_iters``.

    Raises:
        ValueError: the factor does not fit the scale.
    """
    if step in extra_save_iters:
        return True
    if checkpoint_factor is None or step < 1:
        return False
    if checkpoint_scale == "linear":
        if checkpoint_factor < 1 or checkpoint_factor != int(checkpoint_factor):
            raise ValueError(
                f"checkpoint_factor {checkpoint_factor} with the linear scale must be a whole "
                "number of steps"
            )
        return step % int(checkpoint_factor) == 0
    if checkpoint_factor <= 1:
        raise ValueError(f"checkpoint_factor {checkpoint_factor} with the log scale must exceed 1")
    power = 0
    while int(checkpoint_factor**power) < step:
        power += 1
    return int(checkpoint_factor**power) == step


def temporary_name(step: int) -> str:
    """Return a new hidden name for the checkpoint of ``step`` while it is written."""
    return f"{_WRITING}global_step{step}-{uuid.uuid4().hex[:12]}"


def temporary_path(save: Path, step: int, token: str) -> Path:
    """Return where the checkpoint of ``step`` is written before it has its name."""
    return save / f"{_WRITING}global_step{step}-{token}"


def commit_checkpoint(temporary: Path, step: int) -> Path:
    """Give a completely written checkpoint its name.

    One already there is moved into it as ``.replaced``: to be deleted by
    :func:`delete_replaced` when ``latest`` is right.

    Raises:
        RunDirectoryError: the directories cannot be renamed, or the next writer has taken
            ``temporary`` away; what was there before is there again.
    """
    final = checkpoint_path(temporary.parent, step)
    try:
        if os.path.lexists(final):
            final.rename(temporary / _REPLACED)
            reach("commit: old checkpoint set aside")
        temporary.rename(final)
        reach("commit: checkpoint named")
        fsync_directory(final.parent)
    except OSError as error:
        undo_checkpoint(temporary)
        raise RunDirectoryError(f"{temporary} could not become {final}: {error}") from error
    return final


def delete_replaced(checkpoint: Path) -> None:
    """Delete the checkpoint whose place ``checkpoint`` took; the next launch does what fails."""
    _delete(checkpoint / _REPLACED)


def undo_checkpoint(temporary: Path) -> None:
    """Delete a checkpoint that was not committed; one it was to replace gets its name back.

    Nothing happens if it is no longer there. What cannot be undone is left to the next launch.
    """
    try:
        _undo(temporary)
    except OSError as error:
        logger.warning("%s is left for the next launch to remove: %s", temporary, error)


def remove_leftovers(save: Path) -> list[str]:
    """Finish or undo what killed saves and deletions left under ``save``; call it as its writer.

    A checkpoint that has its name is kept, and what it replaced is deleted; one without is deleted,
    and what it was to replace gets its name back. Afterwards a former writer that is still alive
    can publish nothing anymore.

    Returns:
        The names removed, or given back.

    Raises:
        OSError: something cannot be taken from its former writer. What is taken but cannot be
            deleted is logged: it only costs space.
    """
    removed = []
    for folder in (save, save / "attempts"):
        for entry in folder.glob(".*"):
            if is_prepared_name(entry.name):
                entry.unlink(missing_ok=True)
                removed.append(entry.name)
    for entry in _hidden(save, _WRITING):
        _undo(entry)
        removed.append(entry.name)
    for entry in _hidden(save, _UNDONE):
        _finish_undoing(entry)
        removed.append(entry.name)
    for entry in _hidden(save, _DELETED):
        _delete(entry)
        removed.append(entry.name)
    for step in list_checkpoints(save):
        checkpoint = checkpoint_path(save, step)
        if not checkpoint.is_symlink() and os.path.lexists(checkpoint / _REPLACED):
            _delete(checkpoint / _REPLACED)
            removed.append(f"{checkpoint.name}/{_REPLACED}")
    return sorted(removed)


def _undo(temporary: Path) -> None:
    undone = temporary.with_name(temporary.name.replace(_WRITING, _UNDONE, 1))
    try:
        temporary.rename(undone)
    except FileNotFoundError:
        return  # its writer has named it this very moment, or somebody else undoes it
    reach("undo: taken from its writer")
    _finish_undoing(undone)


def _finish_undoing(undone: Path) -> None:
    step = step_of(undone.name.removeprefix(_UNDONE).rpartition("-")[0])
    replaced = undone / _REPLACED
    if step is not None and os.path.lexists(replaced):
        final = checkpoint_path(undone.parent, step)
        if not os.path.lexists(final):
            replaced.rename(final)
            fsync_directory(final.parent)
            reach("undo: old checkpoint named again")
    _delete(undone)


def _hidden(save: Path, prefix: str) -> list[Path]:
    return sorted(entry for entry in save.glob(f"{prefix}global_step*") if not entry.is_symlink())


def _delete(path: Path) -> None:
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()  # of a link, never what it points to
        elif path.exists():
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s is not deleted completely: %s", path, error)
