"""A run as questions find it: in its save directory, also while it trains, or in a checkpoint."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron.base.errors import CheckpointError, RunDirectoryError
from megatron.config.batch_geometry import BatchGeometry
from megatron.ledger.ledger_file import LEDGER_FILE, Ledger, Span, StreamState
from megatron.ledger.lineage import Lineage, lineage_of_checkpoint, lineage_of_run
from megatron.ledger.queries.adopted_geometry import adopted_geometry
from megatron.ledger.run_directory import checkpoint_path, list_checkpoints, read_latest, step_of
from megatron.ledger.run_file import RUN_FILE
from megatron.stream.order_description import OrderDescription
from megatron.stream.segments import Segment

__all__ = ["RunView", "Stage", "open_run"]

Stage = Literal["recorded", "unrecorded", "adopted", "planned"]
"""What is known of a step: a line says that it was done; a checkpoint says so, but the line isn't
here; it was computed for a checkpoint without a ledger; or it wasn't done yet."""


@dataclass(frozen=True)
class RunView:
    """The newest lineage of a run, or that of one checkpoint."""

    path: Path  # what was asked about
    lineage: Lineage
    save: Path | None  # directory with attempts/; None: a checkpoint alone

    @property
    def lost_attempts(self) -> Path | None:
        """The attempts/ that its save directory must have had and no longer has; else None."""
        if self.save is not None:
            return None
        folder = self.path if (self.path / RUN_FILE).exists() else self.path.resolve().parent
        return folder / "attempts" if (folder / RUN_FILE).exists() else None

    @property
    def ledger(self) -> Ledger:
        """Return what the lineage says, with the segments that later steps would be taken in."""
        return self.lineage.ledger

    def stream(self, name: str) -> StreamState:
        """Return a stream.

        Raises:
            RunDirectoryError: the run has none of that name.
        """
        state = self.ledger.streams.get(name)
        if state is None or not state.segments.segments:
            known = ", ".join(sorted(self.ledger.streams))
            raise RunDirectoryError(f"{self.path}: the run reads no {name} data, only {known}")
        return state

    def order(self, segment: Segment) -> OrderDescription:
        """Return the order of a segment.

        Raises:
            RunDirectoryError: the ledger doesn't hold it.
        """
        order = self.ledger.orders.get(segment.order_id)
        if order is None:
            raise RunDirectoryError(
                f"{self.path}: the ledger names order {segment.order_id}, but doesn't describe it; "
                "the file was edited"
            )
        return order

    def stage(self, step: int) -> Stage:
        """Say what is known of a training step."""
        if step > self.ledger.step:
            return "planned"
        span = self.lineage.span_of(step)
        if span is None:
            return "adopted"
        return "unrecorded" if self.lineage.lines_path(span) is None else "recorded"

    def geometry_of(self, step: int) -> BatchGeometry | None:
        """Return how the batch of ``step`` was divided, or would be; None if nothing tells."""
        span = self.lineage.span_of(step)
        if span is None and step > self.ledger.step:
            span = self.newest_span
        return self.adopted_geometry if span is None else span.geometry

    @functools.cached_property
    def adopted_geometry(self) -> BatchGeometry | None:
        """How batches were divided before the run was adopted: told by the checkpoint, or assumed;
        None if nothing was adopted.
        """
        return adopted_geometry(self.ledger)

    @property
    def newest_span(self) -> Span | None:
        """What the newest attempt with lines took."""
        return self.ledger.spans[-1] if self.ledger.spans else None


def open_run(path: Path) -> RunView:
    """Read what is needed to answer questions; works while the run is training.

    Args:
        path: a run's save directory, or one ``global_stepN`` of it, also copied away alone.

    Raises:
        CheckpointError: there is no checkpoint with a ledger.
        RunDirectoryError: files contradict each other or cannot be read.
    """
    if step_of(path.resolve().name) is not None or (path / LEDGER_FILE).exists():
        return _open_checkpoint(path)
    if not path.is_dir():
        raise RunDirectoryError(
            f"{path} is no directory; name a run's save directory, or one global_stepN of it, "
            "with --run"
        )
    lineage = lineage_of_run(path)
    if lineage is None:
        return _open_checkpoint(_newest_checkpoint(path))
    return RunView(path, lineage, path)


def _open_checkpoint(path: Path) -> RunView:
    lineage = lineage_of_checkpoint(path)
    if lineage is None:
        raise CheckpointError(
            f"{path} holds no ledger: NeoX wrote it, or a release that kept none. "
            "neox-ledger explain CONFIG says what a launch would take over from it"
        )
    parent = path.resolve().parent
    return RunView(path, lineage, parent if (parent / "attempts").is_dir() else None)


def _newest_checkpoint(save: Path) -> Path:
    steps = list_checkpoints(save)
    if not steps:
        raise RunDirectoryError(
            f"{save} holds neither attempts nor checkpoints: it is no run directory; name one "
            "with --run"
        )
    latest = read_latest(save)
    return checkpoint_path(save, steps[-1] if latest is None else latest)
