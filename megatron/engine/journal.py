"""The loop's record on one rank: every reader counts what it read, rank 0 writes it down."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from megatron.engine.agreement import raise_together, report_of
from megatron.engine.consumed import collect_digests
from megatron.engine.distributed import ProcessGroups
from megatron.engine.steps import MicroBatchSource
from megatron.ledger.attempts import EvaluationRecord, StepRecord
from megatron.ledger.digests import MODULUS, digest_text
from megatron.ledger.ledger_file import Ledger
from megatron.ledger.recorder import ComponentCursors, Recorder

__all__ = ["Journal"]


class Journal:
    """Records steps and evaluations of a run that is saved.

    Digests are summed over the ranks every ``interval`` steps, by one gather, and before each save,
    so recording adds no collective to a step. What fails on rank 0 as it writes lines is raised on
    every rank by the next gather, ``interval`` steps later at most: before anything that holds
    those steps is saved, and before training ends.

    Args:
        groups: of this rank.
        recorder: on rank 0.
        sources: this rank's micro batches, by stream name.
        interval: steps whose lines may wait.
        component_cursors: where each component of a stream's order goes on; used on rank 0.
    """

    def __init__(
        self,
        groups: ProcessGroups,
        recorder: Recorder | None,
        sources: Mapping[str, MicroBatchSource],
        *,
        interval: int,
        component_cursors: ComponentCursors,
    ) -> None:
        self._groups = groups
        self._recorder = recorder
        self._sources = sources
        self._interval = interval
        self._component_cursors = component_cursors
        self._waiting = 0
        self._error: Exception | None = None  # rank 0's, which no other rank knows of yet

    def started(self, startup_s: Mapping[str, float]) -> None:
        """Note on rank 0 how long the launch took to its first step, by phase."""
        if self._recorder is not None:
            self._recorder.started(startup_s)

    def step(self, record: StepRecord) -> None:
        """Record a step. Collective every ``interval`` steps.

        Raises:
            RunDirectoryError: on every rank, with the lines of the steps before: one of them read
                other samples than the first time it was done, or they could not be written. On
                rank 0 alone: the step isn't the lineage's next.
        """
        if self._recorder is not None:
            self._recorder.step(record)
        self._waiting += 1
        if self._waiting >= self._interval:
            self._write_lines()

    def flush(self) -> None:
        """Write the lines of all steps so far, or fail on every rank. Collective."""
        self._write_lines()
        self._settle()

    def evaluation(self, record: EvaluationRecord) -> None:
        """Record an evaluation, whose digest is worked out here. Collective.

        Raises:
            RunDirectoryError: on every rank: see :meth:`step`, or it isn't where its stream is.
        """
        digests = self._collect(record.stream)
        digest = digest_text(sum(digests.values()) % MODULUS)
        self._on_rank_0(lambda recorder: recorder.evaluation(replace(record, digest=digest)))
        self.flush()

    def ledger(self, *, evaluation_due: bool) -> Ledger | None:
        """Return the ledger of a checkpoint of the last step, on rank 0. Collective."""
        ledger: Ledger | None = None

        def build(recorder: Recorder) -> None:
            nonlocal ledger
            recorder.sync()
            ledger = recorder.ledger(self._component_cursors, evaluation_due=evaluation_due)

        self._write_lines()
        self._on_rank_0(build)
        self._settle()
        return ledger

    @property
    def attempt(self) -> int | None:
        """Number of this launch, on rank 0."""
        return None if self._recorder is None else self._recorder.number

    @property
    def previous_sequence(self) -> int | None:
        """Commit sequence of the lineage's last checkpoint in this directory, on rank 0."""
        return None if self._recorder is None else self._recorder.previous_sequence

    def committed(self, ledger: Ledger | None, sequence: int) -> None:
        """Note on rank 0 that the checkpoint with ``ledger`` is published, as which commit."""
        if self._recorder is not None and ledger is not None:
            self._recorder.committed(ledger, sequence)

    def close(self, reason: str) -> None:
        """Note why the attempt stops; nothing is collected, so lines may be left waiting."""
        if self._recorder is not None:
            self._recorder.close(reason)

    def _write_lines(self) -> None:
        digests = self._collect("train")
        self._waiting = 0
        self._on_rank_0(lambda recorder: recorder.flush(digests))

    def _collect(self, stream: str) -> dict[int, int]:
        return collect_digests(self._groups, self._sources[stream].consumed, self._error)

    def _on_rank_0(self, action: Callable[[Recorder], None]) -> None:
        """Act on rank 0, if nothing has failed there; the next gather tells if this does."""
        if self._recorder is None or self._error is not None:
            return
        try:
            action(self._recorder)
        except Exception as error:  # noqa: BLE001 - raised by the next gather, on every rank
            self._error = error

    def _settle(self) -> None:
        raise_together(self._error, self._groups.gather(report_of(self._error)))
