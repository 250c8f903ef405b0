"""Whether a checkpoint's bytes are those that were written, found out by all ranks together.

Each rank reads its share of the files, so that every byte is read once, and all of them come to the
same verdict before anything is loaded.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.base.errors import MegatronError
from megatron.checkpoint.agreement import Gather
from megatron.checkpoint.structure import checksum_problems, structural_problems, torch_files
from megatron.ledger.checkpoint_choice import in_one_line, quick_problem
from megatron.ledger.manifest import (
    MANIFEST_FILE,
    Manifest,
    digest_problems,
    read_manifest,
    share_by_size,
    share_of_files,
)

__all__ = ["problem_without_bytes", "verify_together"]

_DAMAGED = f"a damaged {MANIFEST_FILE}"


def verify_together(
    checkpoint: Path,
    gather: Gather,
    *,
    rank: int,
    world_size: int,
    is_numbered: bool,
    needs_optimizer: bool = True,
) -> str | None:
    """Return what is wrong with a checkpoint, the same on every rank; None if it is good.

    With a manifest, names, sizes and digests are those it says. Without one (NeoX's, and ours of
    before there were manifests) the files make one whole, and the checksums in them match.

    Args:
        checkpoint: a ``global_stepN``.
        gather: collects a value of every rank, outside of the training's process groups.
        rank: this rank.
        world_size: number of ranks.
        is_numbered: whether it was committed with a sequence, and so must have a manifest.
        needs_optimizer: False if only weights will be loaded from it.
    """

    def look() -> list[str]:
        problem = problem_without_bytes(
            checkpoint, is_numbered=is_numbered, needs_optimizer=needs_optimizer
        )
        return [] if problem is None else [problem]

    view, manifest = _view(checkpoint)
    first_look = gather((view, _caught(look) if rank == 0 else []))
    problem = _difference([view for view, _ in first_look]) or in_one_line(first_look[0][1])
    if problem is None and view == _DAMAGED:
        problem = view  # and sound again when rank 0 looked a second time: not to be trusted
    if problem is not None:
        return problem
    of_ranks = gather(_caught(lambda: _problems_of_share(checkpoint, manifest, rank, world_size)))
    return in_one_line(list(dict.fromkeys(one for problems in of_ranks for one in problems)))


def problem_without_bytes(
    checkpoint: Path, *, is_numbered: bool, needs_optimizer: bool = True
) -> str | None:
    """Return what is wrong with a checkpoint as far as can be told without reading tensors."""
    problem = quick_problem(checkpoint, is_numbered=is_numbered)
    if problem is None and read_manifest(checkpoint) is None:
        return in_one_line(structural_problems(checkpoint, needs_optimizer=needs_optimizer))
    return problem


def _view(checkpoint: Path) -> tuple[str, Manifest | None]:
    """Say which checkpoint this rank sees, and return its manifest if it has a sound one."""
    if not checkpoint.is_dir():
        return "no such directory", None
    try:
        manifest = read_manifest(checkpoint)
    except (MegatronError, OSError):
        return _DAMAGED, None
    if manifest is None:
        return f"no {MANIFEST_FILE}", None
    return f"the {MANIFEST_FILE} of commit {manifest.sequence}", manifest


def _difference(views: Sequence[str]) -> str | None:
    """Find nodes that see another directory under the same path, or an old state of it."""
    for rank, view in enumerate(views):
        if view != views[0]:
            return (
                f"ranks don't see the same: rank 0 {views[0]}, rank {rank} {view}; it must lie on "
                "a file system that all nodes share"
            )
    return None


def _problems_of_share(
    checkpoint: Path, manifest: Manifest | None, rank: int, world_size: int
) -> list[str]:
    if manifest is not None:
        return digest_problems(checkpoint, manifest, share_of_files(manifest, rank, world_size))
    return checksum_problems(checkpoint, share_by_size(torch_files(checkpoint), rank, world_size))


def _caught(look: Callable[[], list[str]]) -> list[str]:
    """Return the problems found; a failure is one too, for the peers wait for an answer."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001 - told as a problem
        is_known = isinstance(error, MegatronError | OSError)
        return [str(error) if is_known else f"{type(error).__name__}: {error}"]
