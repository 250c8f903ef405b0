"""The loop's record on one rank: every reader counts what it read, rank 0 writes it down."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from megatron.engine.agreement import together
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

    Digests are summed over the ranks every ``interval`` steps and before each save, so recording
    adds no collective to a step.

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

    def started(self, startup_s: Mapping[str, float]) -> None:
        """Note on rank 0 how long the launch took to its first step, by phase."""
        if self._recorder is not None:
            self._recorder.started(startup_s)

    def step(self, record: StepRecord) -> None:
        """Record a step. Collective every ``interval`` steps.

        Raises:
            RunDirectoryError: on every rank, with the lines: it read other samples than the first
                time it was done. On rank 0 alone: the step isn't the lineage's next.
        """
        if self._recorder is not None:
            self._recorder.step(record)
        self._waiting += 1
        if self._waiting >= self._interval:
            self.flush()

    def flush(self) -> None:
        """Write the lines of all steps so far. Collective."""
        digests = collect_digests(self._groups, self._sources["train"].consumed)
        self._waiting = 0
        self._on_rank_0(lambda recorder: recorder.flush(digests))

    def evaluation(self, record: EvaluationRecord) -> None:
        """Record an evaluation, whose digest is worked out here. Collective."""
        digests = collect_digests(self._groups, self._sources[record.stream].consumed)
        digest = digest_text(sum(digests.values()) % MODULUS)
        self._on_rank_0(lambda recorder: recorder.evaluation(replace(record, digest=digest)))
        self.flush()

    def ledger(self, *, evaluation_due: bool) -> Ledger | None:
        """Return the ledger of a checkpoint of the last step, on rank 0. Collective."""
        self.flush()
        ledger: Ledger | None = None

        def build(recorder: Recorder) -> None:
            nonlocal ledger
            recorder.sync()
            ledger = recorder.ledger(self._component_cursors, evaluation_due=evaluation_due)

        self._on_rank_0(build)
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

    def _on_rank_0(self, action: Callable[[Recorder], None]) -> None:
        recorder = self._recorder
        together(self._groups, lambda: action(recorder) if recorder is not None else None)
