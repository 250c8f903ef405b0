"""Are the files of a download whole, and those of one step? Their tensors aren't looked at."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron.checkpoint.hugging_face.hub_directory import (
    has_file,
    hub_file,
    published_sha256,
)
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.checkpoint.structure import structural_problems
from megatron.cli.pythia.downloaded import Downloaded, step_named
from megatron.cli.pythia.findings import Finding
from megatron.cli.pythia.known_releases import KnownRelease, known_of
from megatron.cli.pythia.models import ReleasedModel
from megatron.cli.pythia.sha256 import sha256_of

__all__ = ["directory_findings", "file_findings", "has_optimizer"]

_LISTED = 4


def directory_findings(directory: Path, step: int, iteration: int) -> Iterator[Finding]:
    """Compare a directory's name with the step, and its files with the digests the hub gave."""
    named_step = step_named(directory)
    if named_step not in (None, step, iteration):
        yield Finding("warning", f"{directory} is called after step {named_step}, not {step}")
    for path in sorted(directory.iterdir()):
        published = published_sha256(directory, path.name)
        if published is None:
            continue
        found = sha256_of(hub_file(directory, path.name))
        if found != published:
            yield Finding(
                "wrong",
                f"{path} has the SHA-256 {found[:16]}…, the hub's file {published[:16]}…: it is "
                "damaged; remove it and download it again",
            )


def file_findings(
    downloaded: Downloaded, model: ReleasedModel, step: int, entries: Iterable[KnownRelease]
) -> Iterator[Finding]:
    """Compare what files say of themselves, and what is published of them.

    Yields:
        What was found; something "unknown" if their tensors can't all be read.
    """
    yield from _published_digests(downloaded, model, step, entries)
    yield from _step_inside(downloaded, model.iteration(step))
    yield from _structure(downloaded)


def has_optimizer(stored: StoredCheckpoint) -> bool:
    """Return whether NeoX's files hold the state of an optimizer."""
    if stored.optimizer_files or not stored.model_ranks:
        return bool(stored.optimizer_files)
    return stored.model_states(stored.model_ranks[0]).get("optimizer") is not None


def _structure(downloaded: Downloaded) -> Iterator[Finding]:
    """Yield which of NeoX's files are missing, damaged or another save's."""
    stored = downloaded.stored
    if stored is None:
        return
    for problem in structural_problems(stored.directory, needs_optimizer=has_optimizer(stored)):
        yield Finding(
            "unknown",
            f"{stored.directory}: {problem}. Download the step into a directory of its own",
        )


def _published_digests(
    downloaded: Downloaded, model: ReleasedModel, step: int, entries: Iterable[KnownRelease]
) -> Iterator[Finding]:
    """Compare files with those that were published as wrong."""
    found: dict[str, str] = {}
    for entry in known_of(model.name, None, entries):
        for name, digest in entry.sha256.items():
            if not has_file(downloaded.path, name):
                continue
            if name not in found:
                found[name] = sha256_of(hub_file(downloaded.path, name))
            if found[name].startswith(digest) and step not in entry.steps_of_the_file:
                yield Finding(
                    "wrong",
                    f"{name} has the SHA-256 {found[name][:16]}… of a file known to be another "
                    f"step's: {entry.text}",
                    entry.source,
                )


def _step_inside(downloaded: Downloaded, iteration: int) -> Iterator[Finding]:
    inside = downloaded.steps_inside
    others = {name: step for name, step in inside.items() if step != iteration}
    if not others:
        return
    if len(set(inside.values())) > 1:
        names = ", ".join(f"{name} of {step}" for name, step in sorted(inside.items())[:_LISTED])
        yield Finding("wrong", f"files of several steps are mixed: {names}")
    else:
        step = next(iter(others.values()))
        yield Finding("wrong", f"its files say step {step}, not {iteration}")
