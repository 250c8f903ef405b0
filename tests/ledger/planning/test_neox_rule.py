"""What NeoX would do at a resume is counted as users have measured it."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.ledger.planning import Counting, Found, plan_resume
from megatron.ledger.planning.component_ranges import component_ranges
from megatron.ledger.planning.neox_rule import neox_rule, neox_validation_start
from megatron.stream.order_description import ComponentDescription, OrderDescription
from megatron.stream.orders import TokenSpans
from tests.ledger.planning.slow_run import Config
from tests.ledger.planning.slow_world import (
    SlowSource,
    component,
    consumed_tokens,
    ledger_after,
    order,
    order_samples,
)

_COUNTING = Counting(open_order=SlowSource, counts_neox=True)


@dataclass
class OneDocumentPerSample:
    """A dataset large enough never to be passed twice, whose sample n is document n."""

    order: OrderDescription
    head_length: int = 1 << 40

    def spans(self, positions):
        number = len(positions)
        length = np.full(number, self.order.seq_length + 1)
        return TokenSpans(np.arange(number), positions, np.zeros(number, np.int64), length)


def large(*weights):
    components = tuple(
        ComponentDescription(dataset=name, first_document=0, stop_document=1 << 30, head_epochs=1)
        for name in "ABC"[: len(weights)]
    )
    return order(*components, weights=weights if len(weights) > 1 else None)


def large_plan(before, after, steps, *, batch_sizes, train_iters):
    config = Config(batch_size=batch_sizes[0], train_iters=train_iters)
    first = plan_resume(replace(config.wanted(), orders={"train": before}), None)
    ledger = ledger_after(first, 0)
    state = ledger.streams["train"]
    position = steps * batch_sizes[0]
    cursors = {one.component.key: one.stop for one in component_ranges(before, 0, position)}
    state = replace(state, next_position=position, cursors=cursors)
    found = Found(path="/save", record=replace(ledger, step=steps, streams={"train": state}))
    wanted = replace(config, batch_size=batch_sizes[1]).wanted(orders={"train": after})
    return plan_resume(wanted, found, Counting(open_order=OneDocumentPerSample, counts_neox=True))


@pytest.mark.parametrize(
    ("batch_sizes", "repeated", "skipped"),
    [((1024, 512), 512_000, 0), ((512, 1024), 0, 512_000), ((512, 512), 0, 0)],
)
def test_another_batch_size_repeats_or_skips_what_lies_between(batch_sizes, repeated, skipped):
    plan = large_plan(large(1), large(1), 1000, batch_sizes=batch_sizes, train_iters=5000)
    neox = plan.neox
    assert neox.first_sample == 1000 * batch_sizes[1]
    assert neox.consumed_samples == 1000 * batch_sizes[0]
    assert neox.comparison.repeated.samples == repeated
    assert neox.comparison.skipped.samples == skipped
    assert neox.comparison.repeated.documents == repeated
    assert neox.is_exact == (repeated == skipped)
    assert not neox.has_new_order


def test_another_blend_loses_some_samples_of_one_and_repeats_some_of_the_other():
    plan = large_plan(large(1, 1), large(2, 1), 1000, batch_sizes=(100, 100), train_iters=2000)
    counted = plan.neox.comparison
    assert counted.skipped.samples == pytest.approx(16_667, abs=1)
    assert counted.repeated.samples == pytest.approx(16_667, abs=1)
    assert plan.kind == "new_segment"


def test_a_third_dataset_repeats_and_skips_a_third_of_what_was_consumed():
    plan = large_plan(large(1, 1), large(1, 1, 1), 1000, batch_sizes=(100, 100), train_iters=2000)
    counted = plan.neox.comparison
    assert counted.repeated.samples == pytest.approx(33_333, abs=1)
    # NeoX never reads the third dataset's first third, as if it had been there all the time
    assert counted.skipped.samples == pytest.approx(33_333, abs=1)
    assert counted.new.samples == pytest.approx(33_333, abs=1)


def test_more_steps_are_harmless_to_neox_until_the_number_of_epochs_changes():
    config = Config(datasets=("aaaa",), batch_size=1, train_iters=4, seq_length=4)
    found = Found(path="/save", record=ledger_after(plan_resume(config.wanted(), None), 3))
    same = plan_resume(replace(config, train_iters=6).wanted(), found, _COUNTING)
    assert same.neox.is_exact
    # one epoch has 7 samples, of which NeoX never reads the last: step 7 repeats step 1
    full = plan_resume(replace(config, train_iters=7).wanted(), found, _COUNTING)
    assert full.neox.comparison.repeated.samples == 1
    more = plan_resume(replace(config, train_iters=12).wanted(), found, _COUNTING)
    assert more.kind == "continue"
    assert more.neox.has_new_order
    assert more.neox.comparison.repeated


@given(
    st.sampled_from([1, 2, 3]),
    st.integers(0, 12),
    st.integers(1, 12),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
)
@settings(max_examples=150)
def test_another_order_is_counted_token_by_token_with_neoxs_starting_over(
    batch_size, step, remaining, head, other_head, other_seed
):
    ours = order(component("aaaa", head_epochs=head), seq_length=3, seed=4)
    theirs = order(component("aaaa", head_epochs=other_head), seq_length=3, seed=other_seed)
    position = 2 * step
    number = remaining * batch_size
    rule = neox_rule(
        theirs,
        component_ranges(ours, position, position + number),
        step=step,
        consumed_samples=position,
        batch_size=batch_size,
        num_steps=remaining,
        known=ours.components,
        exact_seq_length=3,
        open_order=SlowSource,
    )
    length = SlowSource(theirs).head_length
    key = theirs.components[0].key
    first = step * batch_size
    read = [(key, index % length) for index in range(first, first + number)]
    theirs_tokens = consumed_tokens(theirs, read)
    ours_tokens = consumed_tokens(ours, order_samples(ours, position, position + number))
    assert rule.comparison.repeated.tokens == (theirs_tokens - ours_tokens).total()
    assert rule.comparison.skipped.tokens == (ours_tokens - theirs_tokens).total()


@pytest.mark.parametrize(
    ("step", "gas", "interval", "iters", "micro_batch"),
    [(25, 4, 10, 2, 20), (999, 8, 1000, 10, 70), (500, 32, 1000, 10, 160), (20, 1, 10, 2, 4)],
)
def test_neoxs_validation_start_is_what_was_measured(step, gas, interval, iters, micro_batch):
    assert (
        neox_validation_start(
            step=step, gradient_accumulation_steps=gas, eval_interval=interval, eval_iters=iters
        )
        == micro_batch
    )


def test_a_refused_change_shows_neoxs_way_too():
    config = Config(datasets=("aaaa",), batch_size=4, train_iters=20)
    found = Found(path="/save", record=ledger_after(plan_resume(config.wanted(), None), 7))
    plan = plan_resume(replace(config, seq_length=8).wanted(), found, _COUNTING)
    assert plan.kind == "refuse"
    assert plan.neox.first_sample == 28
    assert plan.data_break.enters_at == 14
    assert plan.neox.comparison.repeated
