"""How the files that all ranks wrote become a checkpoint: by files alone, without collectives.

    every rank  begin        .tmp-global_stepN-<token>/
                             its files, digested while they are written, synced
                leave_entry  .entries/NNNNN.json there: its files' sizes and digests, or its problem
    rank 0      await_entries
                commit       configs/, ledger.json, the entries go, manifest.json,
                             still the writer? global_stepN, still the writer? latest

A kill at any instant leaves the checkpoint before it as it was; a failure on any rank fails the
commit. What a former writer of the directory can still do, and can't, stands in
``run_directory``.
"""

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megatron.base.atomic_files import fsync_directory, write_atomically
from megatron.base.errors import CheckpointError, RunDirectoryError
from megatron.base.file_digests import FileDigest
from megatron.base.write_points import reach
from megatron.ledger.attempt_facts import read_attempt_facts
from megatron.ledger.attempts import next_attempt_number
from megatron.ledger.lease import Lease
from megatron.ledger.ledger_file import (
    LEDGER_FILE,
    CheckpointPlace,
    Ledger,
    ledger_text,
    read_ledger,
)
from megatron.ledger.manifest import (
    Manifest,
    StoredFile,
    quick_problems,
    read_manifest,
    write_manifest,
)
from megatron.ledger.run_directory import (
    checkpoint_path,
    commit_checkpoint,
    delete_replaced,
    list_checkpoints,
    read_latest,
    temporary_path,
    undo_checkpoint,
    write_latest,
)

__all__ = [
    "Entry",
    "abandon",
    "await_entries",
    "begin",
    "commit",
    "is_committed",
    "leave_entry",
    "new_token",
    "next_sequence",
]

_ENTRIES = ".entries"
_POLL_S = (0.005, 0.5)  # between two looks for entries: first, at most


@dataclass(frozen=True)
class Entry:
    """What one rank has written."""

    files: Mapping[str, StoredFile] = field(default_factory=dict)  # by path below the checkpoint
    problem: str | None = None  # why its part is not complete


def new_token() -> str:
    """Return what makes a save's directory unique; one rank asks, all use it."""
    return uuid.uuid4().hex[:12]


def begin(save: Path, step: int, token: str) -> Path:
    """Make the hidden directory that the checkpoint of ``step`` is written into.

    Every rank may call it: whoever comes first makes it, and all of them see it.

    Raises:
        OSError: it cannot be made.
    """
    temporary = temporary_path(save, step, token)
    (temporary / _ENTRIES).mkdir(parents=True, exist_ok=True)
    reach("save: directory made")
    return temporary


def leave_entry(
    temporary: Path, rank: int, files: Mapping[str, StoredFile], problem: str | None = None
) -> None:
    """Say that this rank has written its files and synced them, or why it could not.

    Raises:
        OSError: not even that can be written; rank 0 is then told by an empty file, if possible.
    """
    values = {
        "files": {name: asdict(file) for name, file in files.items()},
        "problem": problem,
    }
    path = temporary / _ENTRIES / f"{rank:05d}.json"
    try:
        fsync_directory(temporary)
        write_atomically(path, json.dumps(values))
    except OSError:
        # A full disk often has room for a name where it has none for content.
        with contextlib.suppress(OSError):
            path.touch()
        raise
    reach("save: entry left")


def await_entries(
    temporary: Path, world_size: int, is_cancelled: Callable[[], bool] = lambda: False
) -> dict[int, Entry]:
    """Wait until every rank has left its entry; return them by rank.

    Nobody writes into the directory anymore when all entries are there.

    Raises:
        CheckpointError: ``is_cancelled`` said so first, or the directory is gone.
    """
    entries: dict[int, Entry] = {}
    pause, longest = _POLL_S
    while len(entries) < world_size:
        _read_entries(temporary, world_size, entries)
        if len(entries) == world_size:
            break
        if is_cancelled():
            missing = [rank for rank in range(world_size) if rank not in entries]
            raise CheckpointError(
                f"the save into {temporary} was given up while {len(missing)} of {world_size} "
                f"ranks were still writing, the first of them rank {missing[0]}"
            )
        time.sleep(pause)
        pause = min(longest, pause * 1.5)
    return entries


def commit(
    temporary: Path,
    step: int,
    *,
    entries: Mapping[int, Entry],
    texts: Mapping[str, str],
    ledger: Ledger | None,
    attempt: int | None,
    parent: int | None,
    lease: Lease | None,
    sequence: int | None = None,
) -> Manifest:
    """Make what lies in ``temporary`` the checkpoint of ``step``, and point ``latest`` at it.

    If it fails, nothing of it is left to see, with one exception: if ``latest`` alone could not be
    replaced, the whole checkpoint stays beside it, and the error says so.

    Args:
        temporary: from :func:`begin`.
        step: of the checkpoint.
        entries: of all ranks.
        texts: rank 0's own small files, by path below the checkpoint, such as ``configs/run.yml``.
        ledger: the lineage up to the checkpoint; None: nothing is recorded.
        attempt: number of this launch, if it is recorded.
        parent: sequence of the lineage's previous checkpoint in this directory, if it has one.
        lease: asked right before each name becomes visible; None: there is no other writer.
        sequence: of this commit, if the caller counts; None: looked up in the directory.

    Raises:
        CheckpointError: a rank has a problem, files are missing, or something cannot be written.
        RunDirectoryError: another job writes here now, or the directories cannot be renamed.
    """
    save = temporary.parent
    try:
        files = _files_of_all(entries)
        if sequence is None:
            sequence = next_sequence(save)
        if ledger is not None:
            ledger = replace(ledger, checkpoint=CheckpointPlace(sequence=sequence, parent=parent))
            texts = {**texts, LEDGER_FILE: ledger_text(ledger)}
        files.update(_write_texts(temporary, texts))
        shutil.rmtree(temporary / _ENTRIES)
        reach("commit: entries removed")
        manifest = Manifest(
            sequence=sequence,
            step=step,
            run_id=None if ledger is None else ledger.run_id,
            attempt=attempt,
            parent=parent,
            files=files,
        )
        _require_complete(temporary, manifest)
        write_manifest(temporary, manifest)
        reach("commit: manifest written")
        require_held = lease.require_held if lease is not None else _nobody_else_writes
        require_held()
        final = commit_checkpoint(temporary, step)
    except BaseException as error:
        abandon(temporary)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"the checkpoint of step {step} could not be completed: {error}"
            ) from error
        raise
    try:
        write_latest(save, step, before_rename=require_held)
    except OSError as error:
        raise CheckpointError(
            f"{final} is complete, but {save / 'latest'} could not be pointed at it: {error}"
        ) from error
    reach("commit: latest replaced")
    delete_replaced(final)
    reach("commit: old checkpoint deleted")
    return manifest


def abandon(temporary: Path) -> None:
    """Discard a checkpoint that is not to be committed; nothing happens if it is gone.

    What a rank still writing keeps alive is left to the next launch.
    """
    undo_checkpoint(temporary)


def is_committed(save: Path, step: int, chain: str) -> bool:
    """Whether ``latest`` names a whole checkpoint of ``step`` whose lineage ends with ``chain``.

    Saving it again would change nothing.
    """
    checkpoint = checkpoint_path(save, step)
    try:
        if read_latest(save) != step:
            return False
        manifest, ledger = read_manifest(checkpoint), read_ledger(checkpoint)
    except CheckpointError:
        return False
    if manifest is None or ledger is None or ledger.chain != chain:
        return False
    return not quick_problems(checkpoint, manifest)


def next_sequence(save: Path) -> int:
    """Return the sequence of the next commit: above all that were ever given in ``save``.

    Manifests tell, also those of checkpoints on their way out, and what attempts have committed.
    """
    directories = [checkpoint_path(save, step) for step in list_checkpoints(save)]
    directories.extend(save.glob(".*global_step*"))
    seen = [0]
    for directory in (*directories, *(one / ".replaced" for one in directories)):
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(directory)
            seen.append(0 if manifest is None else manifest.sequence)
    for number in range(next_attempt_number(save) - 1, 0, -1):
        # One after the other they held the directory: the newest that committed has the highest.
        with contextlib.suppress(RunDirectoryError):
            facts = read_attempt_facts(save, number)
            committed = [one.sequence for one in facts.committed] if facts is not None else []
            known = [one for one in committed if one is not None]
            if known:
                seen.append(max(known))
                break
    return max(seen) + 1


def _read_entries(temporary: Path, world_size: int, entries: dict[int, Entry]) -> None:
    """Add the entries that have come since the last look."""
    try:
        names = set(os.listdir(temporary / _ENTRIES))
    except OSError as error:
        raise CheckpointError(
            f"{temporary} can no longer be read ({error}): another job has taken over, or somebody "
            "deleted it"
        ) from error
    for rank in range(world_size):
        name = f"{rank:05d}.json"
        if rank not in entries and name in names:
            entries[rank] = _entry(temporary / _ENTRIES / name)


def _entry(path: Path) -> Entry:
    try:
        text = path.read_text()
        if not text:
            return Entry(problem="could not even write down what failed: the disk is full?")
        values = json.loads(text)
        files = {name: StoredFile(**file) for name, file in values["files"].items()}
        return Entry(files, values["problem"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Entry(problem=f"left an unreadable entry: {error}")


def _files_of_all(entries: Mapping[int, Entry]) -> dict[str, StoredFile]:
    problems = [f"rank {rank}: {entry.problem}" for rank, entry in entries.items() if entry.problem]
    files: dict[str, StoredFile] = {}
    writer: dict[str, int] = {}
    for rank, entry in entries.items():
        for name, file in entry.files.items():
            if name in files:
                problems.append(f"ranks {writer[name]} and {rank} have both written {name}")
            files[name], writer[name] = file, rank
    if problems:
        raise CheckpointError("\n".join(problems))
    return files


def _write_texts(temporary: Path, texts: Mapping[str, str]) -> dict[str, StoredFile]:
    """Write small files durably, ``ledger.json`` last; return what a manifest says of them."""
    files = {}
    for name in sorted(texts, key=lambda name: (name == LEDGER_FILE, name)):
        data = texts[name].encode()
        path = temporary / name
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            fsync_directory(path.parent.parent)
        write_atomically(path, data)
        reach(f"commit: {name} written")
        digest = FileDigest()
        digest.update(data)
        files[name] = StoredFile(digest.size, digest.hexdigest())
    return files


def _require_complete(temporary: Path, manifest: Manifest) -> None:
    """Find what a rank says it wrote and isn't here: ``save`` isn't shared, say. Reads no bytes."""
    problems = quick_problems(temporary, manifest)
    if problems:
        raise CheckpointError(
            f"what the ranks wrote into {temporary} is not what lies there: "
            + "; ".join(problems[:8])
            + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        )


def _nobody_else_writes() -> None:
    pass
