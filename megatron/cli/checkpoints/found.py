"""Which checkpoints a directory given to a tool means."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron.base.errors import CheckpointError
from megatron.ledger.run_directory import (
    checkpoint_path,
    list_checkpoints,
    read_latest,
    step_of,
)

__all__ = ["Found", "find_checkpoints"]

_CHECKPOINT_FILES = ("layer_*-model_states.pt", "*mp_rank_*_model_states.pt")


@dataclass(frozen=True)
class Found:
    """Checkpoints, and what lies beside them."""

    checkpoints: list[Path]  # by step, ascending
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_checkpoints(directory: Path) -> Found:
    """Return the checkpoint that ``directory`` is, or those it holds as a ``save``.

    Raises:
        CheckpointError: it is neither.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    if step_of(directory.name) is not None or _holds_files(directory):
        return Found([directory])
    steps = list_checkpoints(directory)
    problems, notes = [], []
    hidden = [
        entry.name
        for entry in sorted(directory.glob(".*global_step*"))
        if entry.is_dir() and not entry.name.startswith(".reading-")
    ]
    if hidden:
        notes.append(
            f"{', '.join(hidden)}: left by a save or deletion that was killed, or under way now; "
            "the next launch clears it up"
        )
    if not steps:
        more = f" ({notes[0]})" if notes else ""
        raise CheckpointError(f"{directory} holds no checkpoint: no global_stepN{more}")
    try:
        if read_latest(directory) is None:
            notes.append("latest: there is no such file, so NeoX would not find a checkpoint")
    except CheckpointError as error:
        problems.append(str(error).replace(f"{directory}/", "", 1))
    return Found([checkpoint_path(directory, step) for step in steps], problems, notes)


def _holds_files(directory: Path) -> bool:
    return any(next(directory.glob(pattern), None) for pattern in _CHECKPOINT_FILES)
