"""Is a checkpoint good? Everything that can be told from its files alone, in one verdict."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron.base.errors import CheckpointError
from megatron.checkpoint.stored_values import value_problems
from megatron.checkpoint.structure import Structure, checksum_problems, examine
from megatron.checkpoint.weight_copies import differing_weights
from megatron.ledger.manifest import Manifest, digest_problems, quick_problems, read_manifest

__all__ = ["Verdict", "verify_checkpoint"]


@dataclass
class Verdict:
    """What was found out about one checkpoint."""

    structure: Structure
    manifest: Manifest | None = None
    problems: list[str] = field(default_factory=list)
    """Each names its file first."""
    unknown: list[str] = field(default_factory=list)
    """What could not be checked."""

    @property
    def checkpoint(self) -> Path:
        """Its directory."""
        return self.structure.checkpoint

    @property
    def notes(self) -> list[str]:
        """What a user should know, though it isn't wrong."""
        return self.structure.notes


def verify_checkpoint(
    checkpoint: Path,
    *,
    needs_optimizer: bool = True,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Verdict:
    """Check structure, bytes and values of a checkpoint, NeoX's or ours.

    Bytes are compared with the manifest's digests, or with the checksums that torch's files carry
    where there is no manifest. Memory is bounded by one tensor.

    Args:
        checkpoint: a ``global_stepN``.
        needs_optimizer: optimizer state belongs to it.
        on_file: told how many of how many files are done.
    """
    structure = examine(checkpoint, needs_optimizer=needs_optimizer)
    verdict = Verdict(structure, problems=list(structure.problems))
    if not structure.sizes:
        return verdict
    try:
        verdict.manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        verdict.problems.append(str(error).replace(f"{checkpoint}/", "", 1))
    damaged = _check_bytes(verdict, on_file)
    readable = [name for name in structure.sizes if name not in damaged]
    verdict.problems += value_problems(checkpoint, sorted(readable))
    if not verdict.problems:
        try:
            verdict.problems += differing_weights(structure)
        except CheckpointError as error:
            verdict.problems.append(str(error).replace(f"{checkpoint}/", "", 1))
    return verdict


def _check_bytes(verdict: Verdict, on_file: Callable[[int, int], None]) -> set[str]:
    """Read every file once; return the names of those that aren't worth a closer look."""
    checkpoint, manifest, structure = verdict.checkpoint, verdict.manifest, verdict.structure
    said = {problem.split(" ")[0].rstrip(":,") for problem in structure.problems}
    damaged = {name for name in structure.sizes if name in said}
    if manifest is not None:
        missing_or_extra = quick_problems(checkpoint, manifest)
        verdict.problems += missing_or_extra
        wrong = {problem.split(" ")[0] for problem in missing_or_extra}
        names = sorted(set(manifest.files) - wrong)
    else:
        names = sorted(set(structure.sizes) - damaged)
    for done, name in enumerate(names):
        on_file(done, len(names))
        found = (
            checksum_problems(checkpoint, [name])
            if manifest is None
            else digest_problems(checkpoint, manifest, [name])
        )
        verdict.problems += found
        if found:
            damaged.add(name)
    on_file(len(names), len(names))
    return damaged
