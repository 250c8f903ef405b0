"""What the files of a directory tell about its checkpoints' places, read however damaged they are.

Whatever can't be read is passed over here: for :mod:`megatron.ledger.candidates` the three sources
stand in for each other.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.base.errors import CheckpointError, RunDirectoryError
from megatron.ledger.attempt_facts import AttemptFacts, read_attempt_facts
from megatron.ledger.attempts import next_attempt_number
from megatron.ledger.candidates import (
    AttemptHistory,
    Directory,
    LedgerPlace,
    LineageSpan,
    ManifestPlace,
    NamedCommit,
)
from megatron.ledger.ledger_file import Ledger, read_ledger
from megatron.ledger.manifest import Manifest, read_manifest
from megatron.ledger.run_directory import checkpoint_path, list_checkpoints, read_latest
from megatron.ledger.run_file import read_run_file

__all__ = ["committed_by", "read_directories", "read_histories", "sequence_of"]


def read_directories(directory: Path) -> Iterator[Directory]:
    """Yield where each ``global_stepN`` stands, as far as it tells; another run's doesn't."""
    run_id = _run_id(directory)
    for step in list_checkpoints(directory):
        checkpoint = checkpoint_path(directory, step)
        manifest, ledger = _manifest(checkpoint, step), _ledger(checkpoint, step)
        if manifest is not None and run_id not in (None, manifest.run_id):
            manifest = None
        if ledger is not None and run_id not in (None, ledger.run_id):
            ledger = None
        yield Directory(
            step=step,
            manifest=None
            if manifest is None
            else ManifestPlace(
                sequence=manifest.sequence, attempt=manifest.attempt, parent=manifest.parent
            ),
            ledger=None if ledger is None else _place(ledger, directory),
        )


def read_histories(directory: Path) -> Iterator[AttemptHistory]:
    """Yield what the attempts whose files can be read have loaded and committed."""
    for number in range(1, next_attempt_number(directory)):
        try:
            facts = read_attempt_facts(directory, number)
        except RunDirectoryError:
            continue  # told by whoever needs it; here two other sources stand in
        if facts is None:
            continue
        loaded = facts.loaded
        is_here = loaded is not None and (
            loaded.run_id == facts.run_id or _is_in(Path(loaded.path), directory)
        )
        yield AttemptHistory(
            number=number,
            loaded=NamedCommit(loaded.step, loaded.sequence)
            if loaded is not None and is_here
            else None,
            committed=tuple(NamedCommit(one.step, one.sequence) for one in facts.committed),
            spans=_spans(facts.begin, directory),
        )


def sequence_of(directory: Path, step: int) -> int | None:
    """Return the sequence of a checkpoint, None if it has none or no source tells."""
    checkpoint = checkpoint_path(directory, step)
    manifest = _manifest(checkpoint, step)
    if manifest is not None:
        return manifest.sequence
    ledger = _ledger(checkpoint, step)
    if ledger is not None:
        return None if ledger.checkpoint is None else ledger.checkpoint.sequence
    sequences = [
        one.sequence
        for attempt in read_histories(directory)
        for one in attempt.committed
        if one.step == step
    ]
    return sequences[-1] if sequences else None


def committed_by(save: Path, attempts: Sequence[AttemptFacts]) -> dict[int, list[int]]:
    """Return the steps of the checkpoints that each attempt committed, by its number.

    An attempt that was killed may not have noted the last one; the checkpoint itself knows, and
    ``latest`` names it. One that ``latest`` doesn't name yet was not committed: the launch after it
    would go on from another.
    """
    committed = {facts.number: [one.step for one in facts.committed] for facts in attempts}
    runs = {facts.number: facts.run_id for facts in attempts}
    try:
        latest = read_latest(save)
    except CheckpointError:
        latest = None  # whoever chooses then takes the last commit of all
    for step in list_checkpoints(save):
        manifest = _manifest(checkpoint_path(save, step), step)
        if manifest is None or manifest.attempt is None or latest not in (None, step):
            continue
        number = manifest.attempt
        if runs.get(number) == manifest.run_id and step not in committed[number]:
            committed[number].append(step)
    return committed


def _place(ledger: Ledger, directory: Path) -> LedgerPlace:
    place = ledger.checkpoint
    return LedgerPlace(
        sequence=None if place is None else place.sequence,
        parent=None if place is None else place.parent,
        spans=_spans(ledger, directory),
    )


def _spans(ledger: Ledger, directory: Path) -> tuple[LineageSpan, ...]:
    adopted = ledger.adopted
    is_here = adopted is not None and _is_in(Path(adopted.source), directory)
    return (
        *([LineageSpan.adopted(adopted.step)] if adopted is not None and is_here else []),
        *(
            LineageSpan(span.attempt, span.first_step, span.last_step)
            for span in ledger.spans
            if span.run_id == ledger.run_id
        ),
    )


def _manifest(checkpoint: Path, step: int) -> Manifest | None:
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError:
        return None
    return manifest if manifest is not None and manifest.step == step else None


def _ledger(checkpoint: Path, step: int) -> Ledger | None:
    try:
        ledger = read_ledger(checkpoint)
    except CheckpointError:
        return None
    return ledger if ledger is not None and ledger.step == step else None


def _run_id(directory: Path) -> str | None:
    try:
        run = read_run_file(directory)
    except RunDirectoryError:
        return None
    return None if run is None else run.run_id


def _is_in(checkpoint: Path, directory: Path) -> bool:
    return checkpoint.resolve().parent == directory.resolve()
