"""Whether a checkpoint's bytes are those that were written, found out by all ranks together.

Each rank reads its share of the files, so that every byte is read once, and all of them come to the
same verdict before anything is loaded.
"""

from collections.abc import Callable
from pathlib import Path

from megatron.base.errors import MegatronError
from megatron.checkpoint.agreement import Gather
from megatron.checkpoint.structure import checksum_problems, structural_problems, torch_files
from megatron.ledger.checkpoint_choice import in_one_line, quick_problem
from megatron.ledger.manifest import (
    MANIFEST_FILE,
    digest_problems,
    read_manifest,
    share_by_size,
    share_of_files,
)

__all__ = ["problem_without_bytes", "verify_together"]


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
        if rank != 0:
            return []
        problem = problem_without_bytes(
            checkpoint, is_numbered=is_numbered, needs_optimizer=needs_optimizer
        )
        return [] if problem is None else [problem]

    return (
        _difference_of_view(checkpoint, gather)
        or _together(look, gather)
        or _together(lambda: _problems_of_share(checkpoint, rank, world_size), gather)
    )


def problem_without_bytes(
    checkpoint: Path, *, is_numbered: bool, needs_optimizer: bool = True
) -> str | None:
    """Return what is wrong with a checkpoint as far as can be told without reading tensors."""
    problem = quick_problem(checkpoint, is_numbered=is_numbered)
    if problem is None and read_manifest(checkpoint) is None:
        return in_one_line(structural_problems(checkpoint, needs_optimizer=needs_optimizer))
    return problem


def _difference_of_view(checkpoint: Path, gather: Gather) -> str | None:
    """Find nodes that see another directory under the same path, or an old state of it."""
    try:
        manifest = read_manifest(checkpoint)
        seen = "none" if manifest is None else f"that of commit {manifest.sequence}"
        if not checkpoint.is_dir():
            seen = "no such directory"
    except (MegatronError, OSError):
        seen = "a damaged one"
    of_ranks = gather(seen)
    if len(set(of_ranks)) == 1:
        return None
    other = next(rank for rank, one in enumerate(of_ranks) if one != of_ranks[0])
    return (
        f"ranks don't see the same {MANIFEST_FILE}: rank 0 sees {of_ranks[0]}, rank {other} "
        f"{of_ranks[other]}; it must lie on a file system that all nodes share"
    )


def _problems_of_share(checkpoint: Path, rank: int, world_size: int) -> list[str]:
    manifest = read_manifest(checkpoint)
    if manifest is not None:
        return digest_problems(checkpoint, manifest, share_of_files(manifest, rank, world_size))
    return checksum_problems(checkpoint, share_by_size(torch_files(checkpoint), rank, world_size))


def _together(look: Callable[[], list[str]], gather: Gather) -> str | None:
    try:
        found = look()
    except Exception as error:  # noqa: BLE001 - the peers wait for this rank's answer
        is_known = isinstance(error, MegatronError | OSError)
        found = [str(error) if is_known else f"{type(error).__name__}: {error}"]
    of_all = [problem for problems in gather(found) for problem in problems]
    return in_one_line(list(dict.fromkeys(of_all)))
