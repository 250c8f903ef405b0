"""The batches that attempts died at: positions, documents, and bytes of shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.base.errors import DatasetError, MegatronError
from megatron.ledger.lineage import lineage_of_ledger
from megatron.ledger.queries.advance import AttemptAdvance
from megatron.ledger.queries.run_data import RunData
from megatron.ledger.queries.run_view import RunView
from megatron.ledger.queries.samples import step_frame
from megatron.stream.explanations import SampleParts

__all__ = ["Batch", "batch_of"]

_SHOWN = 16  # samples of a batch in a message; the ledger tells the others


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step reads, or an evaluation."""

    stream: str  # "train" or "valid"
    step: int  # of "valid": which evaluation, from 1
    positions: range  # of the stream
    samples: Sequence[SampleParts]  # empty if `unknown` says why
    unknown: str | None = None

    def lines(self, save: Path) -> Iterator[str]:
        """Yield the text of a message."""
        first, last = self.positions.start, self.positions.stop - 1
        what = "step" if self.stream == "train" else "validation"
        yield f"{what} {self.step} reads positions {first}..{last} of the {self.stream} stream:"
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
        option = "" if self.stream == "train" else f" --stream {self.stream}"
        yield f"  neox-ledger step {self.step}{option} --run {save}    has ranks and rows, too"

    def as_json(self) -> dict[str, Any]:
        """Return the same as plain values, all samples."""
        return {
            "stream": self.stream,
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


def batch_of(save: Path, attempt: AttemptAdvance) -> Batch | None:
    """Return the batch that an attempt died at; None if nothing tells.

    Of several steps that it may have died in, the first.
    """
    facts, died_in = attempt.facts, attempt.died_in
    if died_in is None:
        return None
    view = RunView(save, lineage_of_ledger(facts.begin, [save]), save)
    stream, step = "train", died_in.start
    try:
        if attempt.unfinished_evaluation is not None:
            stream = "valid"
            step = view.stream(stream).segments.step_of(attempt.unfinished_evaluation)
        frame = step_frame(view, step, stream)
    except (MegatronError, ValueError):
        return None
    samples: Sequence[SampleParts] = ()
    unknown = None
    try:
        data = RunData(facts.begin.datasets).stream(frame.order)
        samples = data.explain(frame.order_positions)
    except (DatasetError, OSError) as error:  # the data is gone, or what was wrong with the step
        unknown = str(error)
    return Batch(
        stream=stream, step=step, positions=frame.positions, samples=samples, unknown=unknown
    )
