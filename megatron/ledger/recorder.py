"""What rank 0 writes down while it trains. Part of the loop: nothing is recorded without it.

Lines wait until their digests have been summed over the ranks, every :func:`flush_interval` steps
and before each checkpoint; so recording costs no collective of its own.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from megatron.base.errors import RunDirectoryError
from megatron.ledger.attempt_facts import (
    AttemptFacts,
    CommittedCheckpoint,
    Stop,
    claim_attempt,
    write_attempt_facts,
)
from megatron.ledger.attempts import (
    AttemptLog,
    EvaluationRecord,
    Record,
    StepRecord,
    flush_interval,
)
from megatron.ledger.digests import MODULUS, digest_text, digest_value
from megatron.ledger.ledger_file import Ledger, ObeyedInstruction, Span, StreamState
from megatron.ledger.redone_steps import EarlierLines

__all__ = ["ComponentCursors", "Recorder", "flush_interval"]

logger = logging.getLogger(__name__)

ComponentCursors = Callable[[str, int], Mapping[str, int]]
"""(stream's name, position in its present order) -> the next position of each component."""


class Recorder:
    """Records one attempt: its lines, its facts, and the ledgers of its checkpoints.

    Args:
        save: the run directory; whoever records holds its lock.
        facts: of this launch; its number is given here.
        warn: told when a step done again gave another loss.
        clock: seconds since the epoch.

    Raises:
        OSError: ``save`` cannot be written.
        RunDirectoryError: its attempts cannot be read.
    """

    def __init__(
        self,
        save: Path,
        facts: AttemptFacts,
        *,
        warn: Callable[[str], None] = logger.warning,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._save = save
        self._facts = _with_own_instruction(claim_attempt(save, facts))
        write_attempt_facts(save, self._facts)
        self._updating = threading.Lock()
        self._warn = warn
        self._clock = clock
        self._log = AttemptLog(save, self._facts.number)
        self._earlier = EarlierLines.of_run(save, self._facts)
        self._pending: list[Record] = []
        begin = self._facts.begin
        self._chain = begin.chain
        self._recorded_step = begin.step  # last step with a line
        self._taken_step = begin.step  # last step told of
        self._digest_sum = 0
        self._has_lines = False
        self._next = {name: state.next_position for name, state in begin.streams.items()}

    @property
    def number(self) -> int:
        """Number of the attempt."""
        return self._facts.number

    @property
    def pending_steps(self) -> list[int]:
        """Steps whose digests are still to be told."""
        return [one.step for one in self._pending if isinstance(one, StepRecord)]

    def next_position(self, stream: str) -> int:
        """Return where a stream goes on, after everything recorded or pending."""
        return self._next[stream]

    def step(self, record: StepRecord) -> None:
        """Keep what a step did until its digest is known.

        Raises:
            RunDirectoryError: it isn't the lineage's next step, or not on its positions.
        """
        expected = self._facts.begin.streams["train"].segments.positions(self._taken_step + 1)
        found = (record.step, record.position, record.samples)
        if found != (self._taken_step + 1, expected.start, len(expected)):
            raise RunDirectoryError(
                f"step {record.step} consumed positions {record.position}.."
                f"{record.position + record.samples}, but the lineage goes on with step "
                f"{self._taken_step + 1} at {expected.start}..{expected.stop}: samples would be "
                "repeated or skipped"
            )
        self._taken_step = record.step
        self._next["train"] = expected.stop
        self._pending.append(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Record an evaluation; it is written after the steps before it.

        Raises:
            RunDirectoryError: it didn't begin where its stream goes on.
        """
        expected = self._next[record.stream]
        if record.position != expected:
            raise RunDirectoryError(
                f"the {record.stream} evaluation after step {record.after_step} began at position "
                f"{record.position}, but its stream goes on at {expected}: samples would be "
                "repeated or skipped"
            )
        if not record.at_end:
            self._next[record.stream] = record.position + record.samples
        self._pending.append(record)

    def flush(self, digests: Mapping[int, int] | None = None) -> None:
        """Write every pending line up to the first step whose digest isn't known yet.

        Args:
            digests: step -> sum of its samples' digests over all ranks.

        Raises:
            RunDirectoryError: a step done again read other samples than the first time.
        """
        digests = digests or {}
        ready: list[Record] = []
        for record in self._pending:
            if isinstance(record, StepRecord):
                if record.step not in digests:
                    break
                record = replace(record, digest=digest_text(digests[record.step]))
            ready.append(record)
        if not ready:
            return
        self._chain = self._log.append_chained(ready, self._chain)
        self._has_lines = True
        del self._pending[: len(ready)]
        for record in ready:
            if isinstance(record, StepRecord):
                self._recorded_step = record.step
                self._digest_sum += digest_value(record.digest or "")
        differences = self._earlier.compare(ready)
        for warning in differences.warnings:
            self._warn(warning)
        if differences.errors:
            self._log.sync()  # the lines are the evidence
            raise RunDirectoryError("\n".join(differences.errors))

    def sync(self) -> None:
        """Make every written line durable; called before a checkpoint is published."""
        self._log.sync()

    def ledger(self, component_cursors: ComponentCursors, *, evaluation_due: bool) -> Ledger:
        """Return the ledger of a checkpoint of the last step.

        Args:
            component_cursors: where each component of a stream's present order goes on.
            evaluation_due: whether an evaluation is to be made after this step and hasn't been.

        Raises:
            RunDirectoryError: lines are still pending.
        """
        if self._pending:
            raise RunDirectoryError(
                f"{len(self._pending)} lines up to step {self._taken_step} are not written yet: "
                "a checkpoint's ledger must cover them"
            )
        begin = self._facts.begin
        return replace(
            begin,
            step=self._recorded_step,
            spans=self._spans(),
            evaluation_due=evaluation_due,
            streams={
                name: self._stream_state(name, state, component_cursors)
                for name, state in begin.streams.items()
            },
        )

    @property
    def previous_sequence(self) -> int | None:
        """Sequence of the lineage's last checkpoint in this directory: the parent of the next one.

        None if it has none here, or one without a manifest.
        """
        if self._facts.committed:
            return self._facts.committed[-1].sequence
        loaded = self._facts.loaded
        if loaded is None or Path(loaded.path).resolve().parent != self._save.resolve():
            return None
        return loaded.sequence

    def committed(self, ledger: Ledger, sequence: int | None = None) -> None:
        """Note that the checkpoint with ``ledger`` is published, as which commit of ``save``."""
        checkpoint = CommittedCheckpoint(step=ledger.step, chain=ledger.chain, sequence=sequence)
        self._update(lambda facts: replace(facts, committed=(*facts.committed, checkpoint)))

    def started(self, startup_s: Mapping[str, float]) -> None:
        """Note how long the launch took to its first step, by phase."""
        try:
            self._update(lambda facts: replace(facts, startup_s=startup_s))
        except OSError as error:  # not worth the launch
            self._warn(f"how long the start-up took is not on record: {error}")

    def close(self, reason: str) -> None:
        """Note why the attempt stops; pending lines without digests stay unrecorded.

        Raises:
            RunDirectoryError: see :meth:`flush`; the file is closed all the same.
        """
        try:
            self.flush()
        finally:
            self._log.close()
            stop = Stop(
                reason=reason,
                time=self._clock(),
                step=self._recorded_step,
                chain=self._chain,
                done_step=self._taken_step,
            )
            self._update(lambda facts: replace(facts, stop=stop))

    def _spans(self) -> tuple[Span, ...]:
        begin = self._facts.begin
        if not self._has_lines:
            return begin.spans
        span = Span(
            run_id=self._facts.run_id,
            attempt=self._facts.number,
            first_step=begin.step + 1,
            last_step=self._recorded_step,
            chain=self._chain,
            digest_sum=digest_text(self._digest_sum % MODULUS),
            numerics=self._facts.span_numerics,
            geometry=self._facts.geometry,
        )
        return (*begin.spans, span)

    def _stream_state(
        self, name: str, state: StreamState, component_cursors: ComponentCursors
    ) -> StreamState:
        position = self._next[name]
        segment = state.segments.segments[-1]
        cursors = component_cursors(name, segment.order_position(position))
        return replace(state, next_position=position, cursors={**state.cursors, **cursors})

    def _update(self, change: Callable[[AttemptFacts], AttemptFacts]) -> None:
        with self._updating:  # a checkpoint is published by the thread that wrote it
            facts = change(self._facts)
            write_attempt_facts(self._save, facts)
            self._facts = facts


def _with_own_instruction(facts: AttemptFacts) -> AttemptFacts:
    """Put the instruction that this attempt obeys on its lineage."""
    if not facts.obeyed or facts.instruction is None:
        return facts
    obeyed = ObeyedInstruction(
        instruction=facts.instruction,
        run_id=facts.run_id,
        attempt=facts.number,
        step=facts.begin.step,
    )
    begin = replace(facts.begin, instructions=(*facts.begin.instructions, obeyed))
    return replace(facts, begin=begin)
