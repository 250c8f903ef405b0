"""The batches that attempts died at: positions, documents, and bytes of shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.base.errors import DatasetError, MegatronError
from megatron.ledger.attempt_facts import AttemptFacts
from megatron.ledger.lineage import lineage_of_ledger
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.run_view import RunView
from megatron.ledger.queries.samples import step_frame
from megatron.stream.explanations import SampleParts

__all__ = ["Batch", "batch_of_step"]

_SHOWN = 16  # samples of a batch in a message; the ledger tells the others


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step reads."""

    step: int
    positions: range  # of the training stream
    samples: Sequence[SampleParts]  # empty if `unknown` says why
    unknown: str | None = None

    def lines(self, save: Path) -> Iterator[str]:
        """Yield the text of a message."""
        first, last = self.positions.start, self.positions.stop - 1
        yield f"step {self.step} reads positions {first}..{last} of the train stream:"
        if self.unknown is not None:
            yield f"  documents and bytes are not known: {self.unknown}"
        for position, sample in zip(self.positions, self.samples[:_SHOWN], strict=False):
            for part in sample.documents:
                places = ", ".join(
                    f"{piece.path} bytes {piece.start}..{piece.stop}" for piece in part.bytes
                )
                yield (
                    f"  position {position}: document {part.document} of {sample.prefix}, tokens "
                    f"{part.start}..{part.stop}: {places}"
                )
        if len(self.samples) > _SHOWN:
            yield f"  and {len(self.samples) - _SHOWN} samples more:"
        yield f"  neox-ledger step {self.step} --run {save}    has ranks and rows, too"

    def as_json(self) -> dict[str, Any]:
        """Return the same as plain values, all samples."""
        return {
            "step": self.step,
            "positions": [self.positions.start, self.positions.stop],
            "unknown": self.unknown,
            "samples": [
                {
                    "position": position,
                    "dataset": sample.prefix,
                    "documents": [
                        {
                            "document": part.document,
                            "tokens": [part.start, part.stop],
                            "bytes": [
                                {"file": str(piece.path), "bytes": [piece.start, piece.stop]}
                                for piece in part.bytes
                            ],
                        }
                        for part in sample.documents
                    ],
                }
                for position, sample in zip(self.positions, self.samples, strict=False)
            ],
        }


def batch_of_step(save: Path, facts: AttemptFacts, step: int) -> Batch | None:
    """Return the batch that an attempt read, or would have read, in a step; None if nothing tells.

    Args:
        save: the run's directory.
        facts: of the attempt; the step follows the one it began after.
        step: of the training stream.
    """
    view = RunView(save, lineage_of_ledger(facts.begin, [save]), save)
    try:
        frame = step_frame(view, step)
    except MegatronError:
        return None
    samples: Sequence[SampleParts] = ()
    unknown = None
    try:
        stream = RunData(facts.begin.datasets).stream(frame.order)
        samples = stream.explain(frame.order_positions)
    except (DatasetError, OSError) as error:  # the data is gone, or what was wrong with the step
        unknown = str(error)
    return Batch(step=step, positions=frame.positions, samples=samples, unknown=unknown)
