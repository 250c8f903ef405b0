"""``global_stepN/ledger.json``: what led to a checkpoint, and where every stream goes on from it.

The types are values that travel between planning, recording and queries; the format stands at the
end of the file. A ``ledger.json`` with nothing but the part ``model`` was written by a release that
kept no ledger yet; such a checkpoint is treated like one of NeoX's.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.base.atomic_files import write_atomically
from megatron.base.errors import CheckpointError, MegatronError
from megatron.base.regular_files import read_small_text
from megatron.config.batch_geometry import BatchGeometry
from megatron.ledger.instructions import Instruction
from megatron.stream.order_description import OrderDescription
from megatron.stream.segments import Segment, SegmentTable

__all__ = [
    "FORMAT",
    "LEDGER_FILE",
    "AcceptedChange",
    "Adoption",
    "Amount",
    "CheckpointPlace",
    "DatasetNote",
    "Ledger",
    "ModelPart",
    "ObeyedInstruction",
    "Parent",
    "Span",
    "StreamState",
    "TokenizerIdentity",
    "ledger_from_json",
    "ledger_text",
    "ledger_to_json",
    "parent_from_json",
    "read_ledger",
    "write_ledger",
]

LEDGER_FILE = "ledger.json"
_LIMIT_BYTES = 1 << 28
FORMAT = 1
"""Raised when a reader of the old format would misunderstand the new one."""
_KNOWN_BY = {
    "sampled": "samples of its bytes",
    "index": "its index and the token files that were there",
}


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """Facts that the first checkpoint of a run pins, and the size its writer ran at."""

    padded_vocab_size: int
    tp_bias_multiplicity: int
    tensor_parallel_size: int


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """How a stream came to where it is, and where it goes on."""

    segments: SegmentTable  # an evaluation stream's "step" is an evaluation, from 1
    next_position: int
    cursors: Mapping[str, int] = field(default_factory=dict)
    """Component key -> its next position, also of components that no order draws from now."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Steps of the lineage that one attempt took.

    If only an evaluation was made before the checkpoint, ``last_step`` is ``first_step - 1``.
    """

    run_id: str
    attempt: int
    first_step: int
    last_step: int  # inclusive
    chain: str  # of the last line before the checkpoint
    digest_sum: str
    """Of the steps' digests, modulo 2^64, 16 hexadecimal digits; empty of an attempt whose lines no
    checkpoint covers yet."""
    numerics: str = ""  # hash of everything that acts on numbers; equal: comparable losses
    geometry: BatchGeometry | None = None  # how its batches were divided


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """What a tokenizer is, wherever its files lie."""

    type: str
    files: tuple[str, ...]  # SHA-256 of vocabulary, merges (as far as it has them)


@dataclass(frozen=True, kw_only=True)
class DatasetNote:
    """Where a dataset was seen last, and how thoroughly its content was looked at."""

    path: str  # prefix
    level: str  # "complete", "sampled", or "index" where token files are missing
    num_documents: int
    num_tokens: int
    companions: Mapping[str, str] = field(default_factory=dict)  # "label", "reward", "ref" -> path
    index: str = ""  # digest of its index: what is recognised while shards are missing
    pieces: str = ""  # short digests of what was looked at of its bytes


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The checkpoint of another run that this one began with."""

    run_id: str
    step: int
    chain: str  # its chain head
    save: str  # directory of that run when it was read
    is_continued: bool  # its steps are part of this lineage; False: finetuned, positions from 0
    parent: "Parent | None" = None  # that run's own


@dataclass(frozen=True, kw_only=True)
class Adoption:
    """A checkpoint without a ledger, whose lineage was computed instead of observed."""

    source: str  # directory of the checkpoint
    step: int  # steps up to here are adopted
    assumed: tuple[str, ...]  # sentences: what the checkpoint did not say
    geometry: BatchGeometry | None = None
    """How the batches of its steps were divided, said or assumed; None: the first release kept no
    note of it."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much data; a document counts if at least one of its tokens does."""

    tokens: int = 0
    documents: int = 0
    samples: float = 0.0  # tokens / seq_length


@dataclass(frozen=True, kw_only=True)
class AcceptedChange:
    """A change after which no exact continuation exists, made because the configuration said so."""

    after_step: int
    keys: tuple[str, ...]  # of accept_data_change, as far as they were needed
    repeated: Amount
    skipped: Amount
    new: Amount
    horizon_step: int  # the counts are those of the steps up to here
    is_exact: bool  # False: too long to count, the amounts are estimates


@dataclass(frozen=True, kw_only=True)
class ObeyedInstruction:
    """A one-time instruction that the lineage went through."""

    instruction: Instruction
    run_id: str
    attempt: int
    step: int  # where the run went on from


@dataclass(frozen=True, kw_only=True)
class CheckpointPlace:
    """Where the checkpoint that a ledger lies in stands among those of its ``save``."""

    sequence: int  # commits into this `save`, from 1
    parent: int | None  # sequence of the lineage's previous checkpoint here; None: it has none


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Everything that is known of a lineage when ``step`` is done."""

    model: ModelPart
    run_id: str
    step: int
    streams: Mapping[str, StreamState]  # "train", "valid", "test"
    orders: Mapping[str, OrderDescription]  # by order_id, all that a segment names
    spans: tuple[Span, ...] = ()
    evaluation_due: bool = False  # the cursors are those before it
    tokenizer: TokenizerIdentity | None = None
    datasets: Mapping[str, DatasetNote] = field(default_factory=dict)  # by identity
    parent: Parent | None = None
    instructions: tuple[ObeyedInstruction, ...] = ()
    adopted: Adoption | None = None
    accepted: tuple[AcceptedChange, ...] = ()
    checkpoint: CheckpointPlace | None = (
        None  # None: not in a checkpoint, or in one without a place
    )

    @property
    def chain(self) -> str:
        """What the next line continues from: the last line's chain, or the run's id."""
        return self.spans[-1].chain if self.spans else self.run_id

    @property
    def exactness(self) -> str:
        """Say in words what is known to have been consumed."""
        first = self.adopted.step + 1 if self.adopted is not None else 1
        sentences = []
        if first > 1:
            sentences.append(
                f"Steps 1..{first - 1} are adopted: computed from the checkpoint, not observed."
            )
        if self.step >= first:
            sentences.append(
                f"Steps {first}..{self.step} consumed every position of the training stream once."
            )
        sentences.extend(
            f"After step {change.after_step} the data was changed ({', '.join(change.keys)}): "
            f"up to step {change.horizon_step} {change.repeated.tokens} tokens are repeated and "
            f"{change.skipped.tokens} skipped{'' if change.is_exact else ' (estimated)'}."
            for change in self.accepted
        )
        for level, how in _KNOWN_BY.items():
            count = sum(note.level == level for note in self.datasets.values())
            if count:
                sentences.append(
                    f"The content of {count} of {len(self.datasets)} datasets is known by {how}."
                )
        return " ".join(sentences)


def read_ledger(checkpoint: Path) -> Ledger | None:
    """Return the ledger in a ``global_stepN`` directory.

    Returns:
        None if there is none: NeoX wrote the checkpoint, or a release that kept no ledger.

    Raises:
        CheckpointError: it was damaged, edited, or written by a newer release.
    """
    path = checkpoint / LEDGER_FILE
    if not os.path.lexists(path):
        return None
    text = read_small_text(path, limit_bytes=_LIMIT_BYTES)
    try:
        values = json.loads(text)
        if set(values) == {"model"}:
            return None
        return ledger_from_json(values)
    except MegatronError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a ledger ({type(error).__name__}: {error}); it was damaged or edited. "
            "Load another checkpoint, or restore that file"
        ) from error


def write_ledger(checkpoint: Path, ledger: Ledger) -> None:
    """Write ``ledger.json`` into a checkpoint's directory, durably."""
    write_atomically(checkpoint / LEDGER_FILE, ledger_text(ledger))


def ledger_text(ledger: Ledger) -> str:
    """Return the content of ``ledger.json``."""
    return json.dumps(ledger_to_json(ledger), indent=1) + "\n"


def ledger_to_json(ledger: Ledger) -> dict[str, Any]:
    """Return plain values; :func:`ledger_from_json` gives the same ledger back."""
    return {
        "format": FORMAT,
        "exactness": ledger.exactness,
        "model": asdict(ledger.model),
        "run_id": ledger.run_id,
        "step": ledger.step,
        "checkpoint": _or_none(ledger.checkpoint),
        "evaluation_due": ledger.evaluation_due,
        "streams": {
            name: {
                "segments": [asdict(segment) for segment in state.segments],
                "next_position": state.next_position,
                "cursors": dict(state.cursors),
            }
            for name, state in ledger.streams.items()
        },
        "orders": {name: order.to_json() for name, order in ledger.orders.items()},
        "spans": [asdict(span) for span in ledger.spans],
        "tokenizer": _or_none(ledger.tokenizer),
        "datasets": {name: asdict(note) for name, note in ledger.datasets.items()},
        "parent": _or_none(ledger.parent),
        "instructions": [asdict(one) for one in ledger.instructions],
        "adopted": _or_none(ledger.adopted),
        "accepted": [asdict(change) for change in ledger.accepted],
    }


def ledger_from_json(values: Mapping[str, Any]) -> Ledger:
    """Return the ledger that :func:`ledger_to_json` was given.

    Raises:
        CheckpointError: it has a newer format, or an order that isn't what its name says.
        KeyError, TypeError, ValueError: it is no ledger.
    """
    if values["format"] != FORMAT:
        raise CheckpointError(
            f"ledger format {values['format']} is not known; this release reads format {FORMAT}"
        )
    orders = {name: OrderDescription.from_json(one) for name, one in values["orders"].items()}
    for name, order in orders.items():
        if order.order_id != name:
            raise CheckpointError(
                f"the order called {name} is {order.order_id}: the ledger was edited"
            )
    tokenizer, adopted = values["tokenizer"], values["adopted"]
    place = values.get("checkpoint")  # the first release gave no places
    return Ledger(
        model=ModelPart(**values["model"]),
        run_id=values["run_id"],
        step=values["step"],
        evaluation_due=values["evaluation_due"],
        streams={name: _stream(one) for name, one in values["streams"].items()},
        orders=orders,
        spans=tuple(_span(one) for one in values["spans"]),
        tokenizer=None
        if tokenizer is None
        else TokenizerIdentity(type=tokenizer["type"], files=tuple(tokenizer["files"])),
        datasets={name: DatasetNote(**one) for name, one in values["datasets"].items()},
        parent=parent_from_json(values["parent"]),
        instructions=tuple(_obeyed(one) for one in values["instructions"]),
        adopted=None if adopted is None else _adoption(adopted),
        accepted=tuple(_accepted(one) for one in values["accepted"]),
        checkpoint=None if place is None else CheckpointPlace(**place),
    )


def parent_from_json(values: Mapping[str, Any] | None) -> Parent | None:
    """Return the parent that ``dataclasses.asdict`` made plain."""
    if values is None:
        return None
    return Parent(**{**values, "parent": parent_from_json(values["parent"])})


def _or_none(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _stream(values: Mapping[str, Any]) -> StreamState:
    return StreamState(
        segments=SegmentTable(tuple(Segment(**one) for one in values["segments"])),
        next_position=values["next_position"],
        cursors=values["cursors"],
    )


def _adoption(values: Mapping[str, Any]) -> Adoption:
    geometry = values.get("geometry")
    return Adoption(
        source=values["source"],
        step=values["step"],
        assumed=tuple(values["assumed"]),
        geometry=None if geometry is None else BatchGeometry(**geometry),
    )


def _span(values: Mapping[str, Any]) -> Span:
    geometry = values["geometry"]
    return Span(**{**values, "geometry": None if geometry is None else BatchGeometry(**geometry)})


def _obeyed(values: Mapping[str, Any]) -> ObeyedInstruction:
    return ObeyedInstruction(**{**values, "instruction": Instruction(**values["instruction"])})


def _accepted(values: Mapping[str, Any]) -> AcceptedChange:
    amounts = {name: Amount(**values[name]) for name in ("repeated", "skipped", "new")}
    return AcceptedChange(**{**values, **amounts, "keys": tuple(values["keys"])})
