"""Exactly which tokens one plan consumes more or less often than another.

Two futures of a run are given as ranges of samples. What both consume alike is taken out first, so
an unchanged part costs nothing. The rest becomes intervals of tokens within documents, +1 for the
second future and -1 for the first; sorted by place, their running sum says how much more often each
token is consumed. Documents are independent of each other, so they are dealt into as many passes as
memory asks for.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron.base.errors import MegatronError
from megatron.ledger.planning.component_ranges import ComponentRange
from megatron.ledger.planning.inputs import OpenOrder, SampleSource
from megatron.stream.order_description import ComponentDescription, OrderDescription
from megatron.stream.orders import TokenSpans

__all__ = ["COUNTED_SAMPLES", "CannotCountError", "Comparison", "Quantity", "compare"]

COUNTED_SAMPLES = 100_000_000
"""More are counted only when asked for: so many take about ten minutes of one core."""

_SAMPLES_PER_READ = 1 << 18
_EVENTS_PER_PASS = 1 << 27  # two gigabytes; every pass reads all samples again
_EVENTS_PER_SWEEP = 1 << 20
_OFFSET_BITS = 31  # documents have fewer tokens, and datasets fewer documents


@dataclass(frozen=True)
class Quantity:
    """An amount of data; a document counts if at least one of its tokens does."""

    tokens: int
    documents: int | None  # None: the content is no longer there to be counted
    seq_length: int

    @property
    def samples(self) -> float:
        """Tokens in samples; a change of seq_length need not give a whole number."""
        return self.tokens / self.seq_length

    def __bool__(self) -> bool:
        return self.tokens > 0

    def __str__(self) -> str:
        samples = f"{self.samples:,.2f}".rstrip("0").rstrip(".")
        documents = "an unknown number of" if self.documents is None else f"{self.documents:,}"
        return f"{samples} samples ({self.tokens:,} tokens of {documents} documents)"


@dataclass(frozen=True)
class Comparison:
    """What a plan consumes more often, less often, or anew, compared with another."""

    repeated: Quantity
    skipped: Quantity
    new: Quantity  # of documents that the other order hasn't at all

    @property
    def parts(self) -> dict[str, Quantity]:
        """The three quantities by name."""
        return {"repeated": self.repeated, "skipped": self.skipped, "new": self.new}

    def __bool__(self) -> bool:
        return bool(self.repeated or self.skipped or self.new)


class CannotCountError(MegatronError):
    """The numbers can't be had here; the message says why."""


def compare(
    before: Sequence[ComponentRange],
    after: Sequence[ComponentRange],
    *,
    known: Sequence[ComponentDescription],
    seq_lengths: tuple[int, int],
    open_order: OpenOrder | None,
    is_unlimited: bool = False,
) -> Comparison:
    """Count the tokens of ``after`` against those of ``before``.

    A sample consumes its first seq_length tokens; the last one belongs to the next sample.

    Args:
        before: samples the undisturbed run consumes.
        after: samples consumed instead.
        known: components of the undisturbed order; tokens of other documents are new.
        seq_lengths: of ``before`` and of ``after``.
        open_order: opens a component's order; None: only what needs no data is counted.
        is_unlimited: count however long it takes.

    Raises:
        CannotCountError: too many samples, or content that both have can't be read.
    """
    by_dataset: defaultdict[str, list[_Surplus]] = defaultdict(list)
    for surplus in _surpluses(before, after):
        by_dataset[surplus.order.components[0].dataset].append(surplus)
    everything = [one for group in by_dataset.values() for one in group]
    for sign in (1, -1):
        samples = sum(one.samples * abs(one.times) for one in everything if one.times * sign > 0)
        if samples > COUNTED_SAMPLES and not is_unlimited:
            raise CannotCountError(
                f"{samples:,} samples differ, and up to {COUNTED_SAMPLES:,} are counted; "
                "`neox-ledger explain --exact` counts them all"
            )
    more, less, new = _Tally(), _Tally(), _Tally()
    for dataset, surpluses in by_dataset.items():
        ranges = [
            (one.first_document, one.stop_document) for one in known if one.dataset == dataset
        ]
        for tally, part in zip(
            (more, less, new), _count(surpluses, ranges, open_order), strict=True
        ):
            tally.add(part)
    return Comparison(
        repeated=more.quantity(seq_lengths[1]),
        skipped=less.quantity(seq_lengths[0]),
        new=new.quantity(seq_lengths[1]),
    )


@dataclass(frozen=True)
class _Surplus:
    """Samples that one side consumes more often."""

    order: OrderDescription
    start: int
    stop: int
    times: int  # how much more often; negative: less often

    @property
    def samples(self) -> int:
        return self.stop - self.start


@dataclass
class _Tally:
    tokens: int = 0
    documents: int | None = 0

    def add(self, other: "_Tally") -> None:
        self.tokens += other.tokens
        if other.documents is None or self.documents is None:
            self.documents = None
        else:
            self.documents += other.documents

    def quantity(self, seq_length: int) -> Quantity:
        return Quantity(self.tokens, self.documents, seq_length)


def _surpluses(
    before: Sequence[ComponentRange], after: Sequence[ComponentRange]
) -> Iterator[_Surplus]:
    """Yield the samples that aren't consumed equally often by both sides."""
    changes: defaultdict[OrderDescription, defaultdict[int, int]] = defaultdict(
        lambda: defaultdict(int)
    )
    for ranges, sign in ((before, -1), (after, 1)):
        for one in ranges:
            changes[one.order][one.start] += sign
            changes[one.order][one.stop] -= sign
    for order, levels in changes.items():
        times, previous = 0, 0
        for place, change in sorted(levels.items()):
            if times and place > previous:
                yield _Surplus(order, previous, place, times)
            times, previous = times + change, place


def _count(
    surpluses: Sequence[_Surplus],
    known: Sequence[tuple[int, int]],
    open_order: OpenOrder | None,
) -> tuple[_Tally, _Tally, _Tally]:
    """Count one dataset: tokens consumed more often, less often, and new ones."""
    try:
        if open_order is None:
            raise CannotCountError("the data isn't looked at here")
        sources = [open_order(surplus.order) for surplus in surpluses]
    except MegatronError as error:
        return _count_without_data(surpluses, known, error)
    passes = _num_passes(surpluses, sources)
    more, less, new = _Tally(), _Tally(), _Tally()
    for number in range(passes):
        events = [
            events
            for surplus, source in zip(surpluses, sources, strict=True)
            for events in _events(surplus, source, number, passes)
        ]
        if events:
            for tally, part in zip(
                (more, less, new), _sweep(np.concatenate(events), known), strict=True
            ):
                tally.add(part)
    return more, less, new


def _count_without_data(
    surpluses: Sequence[_Surplus], known: Sequence[tuple[int, int]], error: MegatronError
) -> tuple[_Tally, _Tally, _Tally]:
    """Count what needs no data: content that only one side has, in samples that are always full."""
    signs = {surplus.times > 0 for surplus in surpluses}
    is_full = all(surplus.order.packing in ("packed", "sequential") for surplus in surpluses)
    if len(signs) > 1 or not is_full or (True in signs and known):
        raise CannotCountError(
            f"the counts need a dataset that both orders draw from: {error}"
        ) from error
    tokens = sum(
        surplus.samples * abs(surplus.times) * surplus.order.seq_length for surplus in surpluses
    )
    total, nothing = _Tally(tokens, None), _Tally()
    return (nothing, nothing, total) if True in signs else (nothing, total, nothing)


def _num_passes(surpluses: Sequence[_Surplus], sources: Sequence[SampleSource]) -> int:
    """Judge by some samples of each range how many passes keep within memory."""
    events = 0.0
    for surplus, source in zip(surpluses, sources, strict=True):
        looked_at = min(surplus.samples, 1024)
        spans = source.spans(np.arange(surplus.start, surplus.start + looked_at, dtype=np.int64))
        events += 2 * len(spans) / looked_at * surplus.samples * abs(surplus.times)
    return 1 + int(events) // _EVENTS_PER_PASS


def _events(
    surplus: _Surplus, source: SampleSource, number: int, passes: int
) -> Iterator[NDArray[np.int64]]:
    """Yield where the intervals of a pass begin and end, as sortable numbers.

    A number is (document, token, 1 where the running sum goes up).
    """
    goes_up = int(surplus.times > 0)
    for start in range(surplus.start, surplus.stop, _SAMPLES_PER_READ):
        stop = min(start + _SAMPLES_PER_READ, surplus.stop)
        spans = _consumed(source.spans(np.arange(start, stop)), surplus.order.seq_length)
        if passes > 1:
            spans = _only(spans, spans.document % passes == number)
        begin = (spans.document << _OFFSET_BITS) + spans.start
        pair = np.concatenate([begin << 1 | goes_up, (begin + spans.length) << 1 | (1 - goes_up)])
        yield np.repeat(pair, abs(surplus.times)) if abs(surplus.times) > 1 else pair


def _consumed(spans: TokenSpans, seq_length: int) -> TokenSpans:
    """Leave the token out that a full sample has beyond its ``seq_length``."""
    if not len(spans):
        return spans
    last = np.flatnonzero(np.diff(spans.row, append=-1))
    totals = np.diff(np.cumsum(spans.length)[last], prepend=0)
    length = spans.length.copy()
    length[last] -= totals > seq_length
    cut = TokenSpans(spans.row, spans.document, spans.start, length)
    return cut if length[last].all() else _only(cut, length > 0)


def _only(spans: TokenSpans, where: NDArray[np.bool_]) -> TokenSpans:
    return TokenSpans(
        spans.row[where], spans.document[where], spans.start[where], spans.length[where]
    )


def _sweep(
    events: NDArray[np.int64], known: Sequence[tuple[int, int]]
) -> tuple[_Tally, _Tally, _Tally]:
    """Add up the tokens whose running sum is above and below 0."""
    events.sort()
    more, less, new = _Count(), _Count(), _Count()
    level_before = 0
    for start in range(0, len(events) - 1, _EVENTS_PER_SWEEP):
        part = events[start : start + _EVENTS_PER_SWEEP + 1]
        level = level_before + np.cumsum((part[:-1] & 1) * 2 - 1)
        level_before = int(level[-1])
        place = part >> 1
        length = np.diff(place)
        # A document's last event brings the sum back to 0: no interval leads into the next one.
        document = place[:-1] >> _OFFSET_BITS
        surplus = (level > 0) & (length > 0)
        is_known = np.zeros(len(document), dtype=np.bool_)
        for first, stop in known:
            is_known |= (document >= first) & (document < stop)
        tokens = np.abs(level) * length
        more.add(document, tokens, surplus & is_known)
        less.add(document, tokens, (level < 0) & (length > 0))
        new.add(document, tokens, surplus & ~is_known)
    return more.tally, less.tally, new.tally


class _Count:
    """Adds up tokens, and documents that come in ascending order."""

    def __init__(self) -> None:
        self.tally = _Tally()
        self._last_document = -1

    def add(
        self, document: NDArray[np.int64], tokens: NDArray[np.int64], where: NDArray[np.bool_]
    ) -> None:
        chosen = document[where]
        if not len(chosen):
            return
        borders = np.count_nonzero(np.diff(chosen, prepend=self._last_document))
        self.tally.add(_Tally(int(tokens[where].sum()), int(borders)))
        self._last_document = int(chosen[-1])
