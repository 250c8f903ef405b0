"""Counts of repeated and skipped tokens are those of counting one by one."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.base.errors import DatasetError
from megatron.ledger.planning import token_counts
from megatron.ledger.planning.component_ranges import component_ranges, cursors_at
from megatron.ledger.planning.token_counts import CannotCountError, Quantity, compare
from tests.ledger.planning.slow_world import (
    SIZES,
    SlowSource,
    component,
    consumed_tokens,
    order,
    order_samples,
)

_DATASETS = st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=3, unique=True)


@st.composite
def orders(draw):
    datasets = draw(_DATASETS)
    components = [
        component(
            dataset,
            head_epochs=draw(st.sampled_from([None, 1, 2])),
            start=draw(st.integers(0, 9)),
            documents=draw(st.sampled_from([None, (0, (len(SIZES[dataset]) + 1) // 2)])),
        )
        for dataset in datasets
    ]
    weights = draw(st.lists(st.integers(1, 5), min_size=len(datasets), max_size=len(datasets)))
    return order(
        *components,
        weights=weights if len(datasets) > 1 else None,
        seq_length=draw(st.sampled_from([1, 3, 4, 8])),
        seed=draw(st.sampled_from([1, 2])),
    )


@given(orders(), st.integers(0, 300))
def test_cursors_are_where_drawing_one_by_one_ends(one, position):
    expected = {part.key: part.start for part in one.components}
    for key, index in order_samples(one, 0, position):
        expected[key] = index + 1
    assert cursors_at(one, position) == expected


def test_a_dataset_that_is_drawn_once_in_a_million_is_found():
    one = order(component("aaaa"), component("bbbb"), weights=[1, 999_999])
    cursors = cursors_at(one, 300_000)
    assert sum(cursors.values()) == 300_000
    assert 0 <= cursors["aaaa:0-7#0"] <= 1


@given(orders(), orders(), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=300)
def test_counts_equal_brute_force(before, after, start, other_start, number):
    compared = compare(
        component_ranges(before, start, start + number),
        component_ranges(after, other_start, other_start + number),
        known=before.components,
        seq_lengths=(before.seq_length, after.seq_length),
        open_order=SlowSource,
    )
    undisturbed = consumed_tokens(before, order_samples(before, start, start + number))
    instead = consumed_tokens(after, order_samples(after, other_start, other_start + number))
    known = {(one.dataset, document) for one in before.components for document in one.documents}
    added, skipped = instead - undisturbed, undisturbed - instead
    repeated = Counter({token: n for token, n in added.items() if token[:2] in known})
    new = added - repeated
    for quantity, tokens in (
        (compared.repeated, repeated),
        (compared.skipped, skipped),
        (compared.new, new),
    ):
        assert quantity.tokens == tokens.total()
        assert quantity.documents == len({token[:2] for token in tokens})


@given(orders(), orders(), st.integers(1, 40))
@settings(max_examples=60)
def test_passes_over_documents_add_up(before, after, number):
    def counts(events_per_pass):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_counts, "_EVENTS_PER_PASS", events_per_pass)
            patch.setattr(token_counts, "_EVENTS_PER_SWEEP", events_per_pass + 1)
            patch.setattr(token_counts, "_SAMPLES_PER_READ", 7)
            return compare(
                component_ranges(before, 0, number),
                component_ranges(after, 0, number),
                known=before.components,
                seq_lengths=(before.seq_length, after.seq_length),
                open_order=SlowSource,
            )

    assert counts(3) == counts(1 << 20)


def _unavailable(one):
    raise DatasetError("/data/a holds other content")


def test_content_that_is_gone_is_counted_by_samples_and_its_documents_are_unknown():
    before, after = order(component("aaaa")), order(component("bbbb"))
    compared = compare(
        component_ranges(before, 3, 10),
        component_ranges(after, 3, 10),
        known=before.components,
        seq_lengths=(4, 4),
        open_order=lambda one: (
            _unavailable(one) if one.components[0].dataset == "aaaa" else SlowSource(one)
        ),
    )
    assert compared.skipped == Quantity(28, None, 4)
    assert compared.new.tokens == 28
    new = consumed_tokens(after, order_samples(after, 3, 10))
    assert compared.new.documents == len({token[:2] for token in new})
    assert not compared.repeated
    assert str(compared.skipped) == "7 samples (28 tokens of an unknown number of documents)"


def test_a_part_consumed_alike_needs_no_data():
    one = order(component("aaaa"))
    compared = compare(
        component_ranges(one, 3, 10),
        component_ranges(one, 3, 10),
        known=one.components,
        seq_lengths=(4, 4),
        open_order=_unavailable,
    )
    assert not compared


def test_what_both_read_differently_cannot_be_counted_without_data():
    with pytest.raises(CannotCountError, match=r"both orders draw from: /data/a holds other"):
        compare(
            component_ranges(order(component("aaaa")), 0, 5),
            component_ranges(order(component("aaaa"), seed=5), 0, 5),
            known=[component("aaaa")],
            seq_lengths=(4, 4),
            open_order=_unavailable,
        )


class _Endless:
    """One document per sample, so that long ranges are cheap to describe."""

    head_length = 0

    def __init__(self, one):
        self.one = one

    def spans(self, positions):
        number = len(positions)
        return token_counts.TokenSpans(
            np.arange(number), positions % 1000, np.zeros(number, np.int64), np.full(number, 5)
        )


def test_more_samples_than_are_worth_the_wait_are_counted_when_asked_for(monkeypatch):
    monkeypatch.setattr(token_counts, "COUNTED_SAMPLES", 5000)
    ranges = [component_ranges(order(component("aaaa"), seed=seed), 0, 6000) for seed in (1, 2)]
    keys = {"known": [component("aaaa")], "seq_lengths": (4, 4), "open_order": _Endless}
    with pytest.raises(
        CannotCountError, match=r"6,000 samples differ, and up to 5,000 are.*--exact"
    ):
        compare(*ranges, **keys)
    assert not compare(*ranges, **keys, is_unlimited=True)
