"""Which checkpoint a launch loads: where it looks, in which order, and what becomes of bad ones.

    search_for          where to look, from the configuration's keys
    Search.candidates   the checkpoint that ``latest`` names, then its ancestors, newest first
    choose              the first of them that a check finds good
    quick_problem       the check by small files, names and sizes alone

A checkpoint that is named, by ``iteration``, is loaded or nothing is. Nothing is ever deleted.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.base.errors import CheckpointError
from megatron.base.torch_metadata import read_torch_metadata
from megatron.ledger.candidates import Candidate, ordered_candidates
from megatron.ledger.checkpoint_evidence import read_directories, read_histories, sequence_of
from megatron.ledger.ledger_file import LEDGER_FILE, read_ledger
from megatron.ledger.manifest import MANIFEST_FILE, quick_problems, read_manifest
from megatron.ledger.run_directory import checkpoint_path, list_checkpoints, read_latest, step_of

__all__ = [
    "Chosen",
    "Rejected",
    "Search",
    "choose",
    "in_one_line",
    "quick_problem",
    "search_for",
]

_METADATA_FILE = "mp_rank_00_model_states.pt"
_NAMED_IN_MESSAGES = 8


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that can't be loaded."""

    step: int
    problem: str


@dataclass(frozen=True)
class Chosen:
    """The checkpoint that is loaded, and what was wrong with those before it."""

    checkpoint: Path
    rejected: tuple[Rejected, ...] = ()
    latest_problem: str = ""  # why `latest` didn't tell; empty if it did
    is_ancestor: bool = True  # False: the commit sequence alone led here

    @property
    def reason(self) -> str:
        """Say why this one, if it isn't the one that ``latest`` names."""
        parts = []
        step = step_of(self.checkpoint.name)
        if self.latest_problem:
            parts.append(f"{self.latest_problem}: the newest commit stands for it")
        if self.rejected:
            first, *others = self.rejected
            parts.append(
                f"rolled back from step {first.step} to step {step} because "
                f"global_step{first.step} is damaged: {first.problem}"
                + "".join(f"; global_step{one.step} too: {one.problem}" for one in others)
            )
        if not self.is_ancestor:
            parts.append(
                f"nothing readable tells how step {step} came about: it has the highest commit "
                "sequence of those that were not abandoned"
            )
        return "; ".join(parts)


@dataclass(frozen=True)
class Search:
    """Where a launch looks for what it goes on from."""

    directory: Path
    iteration: int | None = None  # only this step will do
    lone_step: int | None = None
    """The directory itself is a checkpoint, of this step: released ones lie so on a hub."""

    def path_of(self, step: int) -> Path:
        """Return the directory with the checkpoint of ``step``."""
        return checkpoint_path(self.directory, step) if self.lone_step is None else self.directory

    def candidates(self) -> Iterator[Candidate]:
        """Yield what may be loaded, the best first; others than the first cost a look at all.

        Raises:
            CheckpointError: the step that was asked for is not there.
        """
        if self.lone_step is not None:
            if self.iteration not in (None, self.lone_step):
                raise CheckpointError(
                    f"iteration: {self.iteration} was asked for, but {self.directory} "
                    f"is itself the checkpoint of step {self.lone_step}"
                )
            yield Candidate(self.lone_step, None)
            return
        steps = list_checkpoints(self.directory)
        if self.iteration is not None:
            if self.iteration not in steps:
                raise CheckpointError(
                    f"iteration: {self.iteration} was asked for, but {self.directory} "
                    f"{'holds ' + _names(steps) if steps else _emptiness(self.directory)}"
                )
            yield Candidate(self.iteration, sequence_of(self.directory, self.iteration))
            return
        latest, _ = self.latest()
        if latest is not None:
            yield Candidate(latest, sequence_of(self.directory, latest))
        found = ordered_candidates(
            latest, read_directories(self.directory), read_histories(self.directory)
        )
        yield from (candidate for candidate in found if candidate.step != latest)

    def latest(self) -> tuple[int | None, str]:
        """Return the step that ``latest`` names, or what is wrong with it."""
        if self.lone_step is not None:
            return self.lone_step, ""
        try:
            latest = read_latest(self.directory)
        except CheckpointError as error:
            return None, str(error)
        return latest, "" if latest is not None else f"{self.directory / 'latest'} is missing"


def search_for(
    load: Path | None, save: Path | None, *, iteration: int | None, finetune: bool
) -> Search | None:
    """Return where a launch looks for a checkpoint, None when it starts at iteration 0.

    Only two launches start at 0: one without ``load``, and one whose ``load`` equals ``save`` and
    finds no checkpoint there (the first of a run that will be continued by the same command).

    Args:
        load: directory to load from, if any.
        save: directory this run saves to, if any.
        iteration: load this step instead of the one ``latest`` names.
        finetune: start a new run from the weights.

    Raises:
        CheckpointError: there is nothing to load, or starting would lose what ``save`` holds.
    """
    is_continuation = load is not None and save is not None and load.resolve() == save.resolve()
    _refuse_losing_checkpoints(load, save, finetune=finetune, is_continuation=is_continuation)
    if load is None:
        if iteration is not None or finetune:
            key = f"iteration: {iteration}" if iteration is not None else "finetune: true"
            raise CheckpointError(f"{key} is set but load is not: there is nothing to load it from")
        return None
    lone_step = None if is_continuation else _lone_step(load)
    if lone_step is not None:
        return Search(load, iteration, lone_step)
    if iteration is None and not list_checkpoints(load):
        if is_continuation:
            _refuse_a_lost_run(load)
            return None
        raise CheckpointError(
            f"load: {load} {_emptiness(load)}. A run starts at iteration 0 only without load, "
            "or when load equals save"
        )
    return Search(load, iteration)


def choose(
    search: Search, candidates: Iterable[Candidate], check: Callable[[Candidate], str | None]
) -> Chosen:
    """Return the first candidate that ``check`` finds nothing wrong with.

    Args:
        search: where they lie.
        candidates: the best first.
        check: returns what is wrong with one, None if it is good.

    Raises:
        CheckpointError: none is good, with everything that is wrong.
    """
    rejected: list[Rejected] = []
    for candidate in candidates:
        problem = check(candidate)
        if problem is None:
            return Chosen(
                search.path_of(candidate.step),
                tuple(rejected),
                "" if search.iteration is not None else search.latest()[1],
                candidate.is_ancestor,
            )
        rejected.append(Rejected(candidate.step, problem))
    raise CheckpointError(_nothing_good(search, rejected))


def quick_problem(checkpoint: Path, *, is_numbered: bool) -> str | None:
    """Return what is wrong with a checkpoint as far as names, sizes and small files tell.

    Args:
        checkpoint: a ``global_stepN``.
        is_numbered: whether it was committed with a sequence, and so with a manifest.
    """
    try:
        manifest = read_manifest(checkpoint)
        if manifest is not None:
            problems = quick_problems(checkpoint, manifest)
            if problems:
                return in_one_line(problems)
        ledger = read_ledger(checkpoint)
    except CheckpointError as error:
        return str(error).removeprefix(f"{checkpoint}/")  # files are named as in other problems
    named = step_of(checkpoint.name)
    if ledger is not None and named is not None and ledger.step != named:
        return f"{LEDGER_FILE} is that of step {ledger.step}"
    place = None if ledger is None else ledger.checkpoint
    if manifest is None:
        if is_numbered or place is not None:
            return f"{MANIFEST_FILE} is missing: without it nothing shows that it is complete"
        return None
    if place is not None and (place.sequence, place.parent) != (manifest.sequence, manifest.parent):
        return (
            f"{LEDGER_FILE} is that of commit {place.sequence}, {MANIFEST_FILE} that of commit "
            f"{manifest.sequence}"
        )
    return None


def in_one_line(problems: Sequence[str]) -> str | None:
    """Return problems as one text, None if there are none."""
    if not problems:
        return None
    more = len(problems) - _NAMED_IN_MESSAGES
    return "; ".join(problems[:_NAMED_IN_MESSAGES]) + (f"; and {more} more" if more > 0 else "")


def _lone_step(directory: Path) -> int | None:
    """Return the step of the checkpoint whose files lie directly in a directory; None: none do."""
    path = directory / _METADATA_FILE
    if list_checkpoints(directory) or not path.is_file():
        return None
    step = read_torch_metadata(path).get("iteration")
    if not isinstance(step, int):
        raise CheckpointError(f"{path} does not say at which step it was saved")
    return step


def _refuse_losing_checkpoints(
    load: Path | None, save: Path | None, *, finetune: bool, is_continuation: bool
) -> None:
    if finetune and is_continuation:
        raise CheckpointError(
            f"finetune: true starts a new run, but load and save are both {save}: "
            "give the new run a save directory of its own"
        )
    kept = list_checkpoints(save) if save is not None else []
    if kept and not is_continuation:
        asked = "load is not set" if load is None else f"load is {load}"
        raise CheckpointError(
            f"save: {save} holds {_names(kept)}, but {asked}: starting there would overwrite them. "
            f"To continue that run set load: {save} (and drop finetune); "
            "for a new run choose an empty save"
        )


def _refuse_a_lost_run(save: Path) -> None:
    """Refuse to begin anew where checkpoints were committed, and none is left."""
    newest = max(
        (commit.step for attempt in read_histories(save) for commit in attempt.committed),
        default=None,
    )
    if newest is not None:
        known = f"its attempts have saved some, up to step {newest}"
    elif os.path.lexists(save / "latest"):
        known = f"{save / 'latest'} says that there was one"
    else:
        return
    raise CheckpointError(
        f"{save} holds no checkpoint, but {known}. Put one back to go on, or choose an empty save "
        "to begin anew"
    )


def _nothing_good(search: Search, rejected: Sequence[Rejected]) -> str:
    directory = search.directory
    if search.iteration is not None and rejected:
        return (
            f"iteration: {search.iteration} was asked for, but "
            f"{search.path_of(rejected[0].step)} cannot be loaded: "
            f"{rejected[0].problem}. Without iteration a launch goes on from the newest good "
            "checkpoint of the run"
        )
    tried = {one.step for one in rejected}
    others = [step for step in list_checkpoints(directory) if step not in tried]
    advice = (
        f"not tried: {_names(others)}, which a roll-back left behind or of which nothing tells "
        f"where they belong; name one of them, such as iteration: {others[-1]}"
        if others
        else "restore one of them from a copy"
    )
    _, problem = search.latest()
    lines = [problem] if problem else []
    lines += [f"{search.path_of(one.step)}: {one.problem}" for one in rejected]
    return "\n".join(
        [
            f"{directory}: no checkpoint of the run can be loaded, and nothing is deleted:",
            *(f"  {line}" for line in lines),
            advice,
        ]
    )


def _emptiness(directory: Path) -> str:
    if not directory.exists():
        return "does not exist"
    return "holds no checkpoint" if directory.is_dir() else "is not a directory"


def _names(steps: Sequence[int]) -> str:
    newest = [f"global_step{step}" for step in reversed(steps[-_NAMED_IN_MESSAGES:])]
    more = len(steps) - len(newest)
    return ", ".join(newest) + (f" and {more} older" if more else "")
