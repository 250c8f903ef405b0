"""The forward-pass check of a run (``checkpoint_validation_with_forward_pass``)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from megatron.base.errors import CheckpointError
from megatron.base.printing import print_rank_0
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.checkpoint.stored_answer import StoredAnswer, read_answer
from megatron.cli.run_data import RunData
from megatron.config.run_config import RunConfig
from megatron.engine.agreement import together
from megatron.engine.distributed import ProcessGroups
from megatron.engine.forward_check import ForwardCheck
from megatron.engine.steps import MicroBatchSource
from megatron.model.facts import ModelFacts

__all__ = ["RunCheck"]


@dataclass(frozen=True)
class RunCheck:
    """A model's answers, with the run's own data. All methods are collective."""

    check: ForwardCheck
    groups: ProcessGroups
    data: RunData
    source: MicroBatchSource  # of training; nothing is taken from it

    @classmethod
    def open(
        cls,
        config: RunConfig,
        groups: ProcessGroups,
        engine: Any,
        facts: ModelFacts,
        data: RunData,
        source: MicroBatchSource,
    ) -> Self:
        """Return the check of a run whose engine is built and whose data is open."""
        check = ForwardCheck(
            groups,
            engine,
            micro_batch_size=config.geometry.micro_batch_size,
            seq_length=config.model.seq_length,
            vocabulary_size=facts.padded_vocab_size,
        )
        return cls(check, groups, data, source)

    def state(self) -> dict[str, Any]:
        """Return what this rank's model-states file keeps of the model as it is now.

        Raises:
            MegatronError: on every rank: the next micro batch cannot be read.
        """
        number = self.check.micro_batch_size
        # The next micro batch, unless the run ends here: what comes then may be dear to read.
        position = max(0, min(self.source.position, self.data.train_end - number))
        tokens = together(self.groups, lambda: self._tokens(position, number))
        return self.check.state(position, tokens)

    def compare(self, checkpoint: Path, *, is_continued: bool) -> None:
        """Compare the loaded model with what ``checkpoint`` says; tell the user.

        Args:
            checkpoint: what was loaded.
            is_continued: the run's stream goes on; False: a new run reads its own.

        Raises:
            CheckpointError: on every rank: the model answers otherwise, or the training stream has
                other tokens where it had been asked.
        """
        check = self.check

        def read() -> StoredAnswer | None:
            stored = StoredCheckpoint(checkpoint, is_verified=True)
            return read_answer(
                stored, seq_length=check.seq_length, vocabulary_size=check.vocabulary_size
            )

        answer = together(self.groups, read)
        if answer is None:
            print_rank_0(
                f"note: forward-pass check: {checkpoint} was saved without it; nothing is compared"
            )
            return
        together(self.groups, lambda: self._require_same_tokens(answer, checkpoint, is_continued))
        print_rank_0(check.compare(answer, source=str(checkpoint)))

    def _tokens(self, position: int, number: int) -> np.ndarray | None:
        if self.groups.rank != 0:
            return None
        return self.data.train_tokens(np.arange(position, position + number, dtype=np.int64))

    def _require_same_tokens(
        self, answer: StoredAnswer, checkpoint: Path, is_continued: bool
    ) -> None:
        position = answer.position
        if self.groups.rank != 0 or position is None or not is_continued:
            return
        if not self.data.has_read_before(position):
            return  # the order is another one from here on, as the plan says
        tokens = self._tokens(position, len(answer.tokens))
        if not np.array_equal(tokens, answer.tokens):
            raise CheckpointError(
                f"{checkpoint}: position {position} of the training stream holds other tokens than "
                "when it was saved, though nothing in the plan says so: a dataset's bytes were "
                "changed in place. Restore them, or name the change: accept_data_change: [data]"
            )
