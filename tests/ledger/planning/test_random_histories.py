"""Random runs, stopped, changed, rolled back and extended, consume what a run with memory would."""

from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from megatron.ledger.planning import Found, plan_resume
from tests.ledger.planning.slow_run import Config, SlowRun
from tests.ledger.planning.slow_world import (
    NOTES,
    SIZES,
    ledger_after,
    new_order,
    order_samples,
)

_SMALL_CHANGES = ("batch_size", "train_iters", "blend")


@st.composite
def blends(draw):
    datasets = draw(st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=3, unique=True))
    weights = draw(
        st.lists(
            st.sampled_from([0.5, 1.0, 2.0, 3.7]), min_size=len(datasets), max_size=len(datasets)
        )
    )
    return {"datasets": tuple(datasets), "weights": tuple(weights)}


@st.composite
def configs(draw):
    return Config(
        **draw(blends()),
        batch_size=draw(st.sampled_from([1, 2, 4, 6])),
        train_iters=draw(st.integers(4, 40)),
        seq_length=draw(st.sampled_from([3, 4])),
    )


@st.composite
def changes(draw, before: Config, *, may_break: bool):
    """Return the next launch's configuration: nothing, one or several things are different."""
    now = before
    for what in draw(st.sets(st.sampled_from(_SMALL_CHANGES), max_size=3)):
        match what:
            case "batch_size":
                now = replace(now, batch_size=draw(st.sampled_from([1, 2, 3, 4, 6, 8])))
            case "train_iters":
                now = replace(now, train_iters=draw(st.integers(4, 80)))
            case "blend":
                now = replace(now, **draw(blends()))
    if may_break and draw(st.integers(0, 3)) == 0:
        keys = draw(st.sets(st.sampled_from(["seed", "seq_length"]), min_size=1))
        if "seed" in keys:
            now = replace(now, seed=draw(st.sampled_from([1234, 77])))
        if "seq_length" in keys:
            now = replace(now, seq_length=draw(st.sampled_from([2, 3, 4, 7])))
    # Rolling back over such a change makes it anew, so the key stays in the file.
    return replace(now, accepts=frozenset({"seed", "seq_length"} if may_break else ()))


def planned_samples(plan, step: int):
    """Yield (dataset, index, its head, its order) of a step's samples, as its segment says."""
    table = plan.train.state.segments
    segment = table.at_step(step)
    positions = table.positions(step)
    start = segment.order_position(positions.start)
    order = plan.orders[segment.order_id]
    components = {one.key: one for one in order.components}
    for key, index in order_samples(order, start, start + len(positions)):
        yield components[key].dataset, index, components[key].head_epochs, order


def run_history(data, *, may_break: bool):
    """Play a random history; return the last plan, the run with memory, and orders per step."""
    config = data.draw(configs())
    run = SlowRun(config)
    plan = plan_resume(config.wanted(), None)
    saved = {0: ledger_after(plan, 0)}
    orders = {}
    for _ in range(data.draw(st.integers(1, 7))):
        taken = data.draw(st.integers(0, 5))
        for step in range(plan.next_step, plan.next_step + taken):
            expected = run.take_step()
            planned = list(planned_samples(plan, step))
            assert [one[:2] for one in planned] == [one[1:] for one in expected]
            assert [one[2] for one in planned] == [run.head(one[1]) for one in expected]
            orders[step] = {dataset: (head, order) for dataset, _, head, order in planned}
            if data.draw(st.booleans()):
                saved[step] = ledger_after(plan, step - plan.step)
        resumed_at = data.draw(st.sampled_from(sorted(saved)[-3:]))
        saved = {step: ledger for step, ledger in saved.items() if step <= resumed_at}
        config = data.draw(changes(config, may_break=may_break))
        found = Found(path=f"/save/global_step{resumed_at}", record=saved[resumed_at])
        plan = plan_resume(config.wanted(), found)
        event(plan.kind)
        assert plan.step == resumed_at
        plan.raise_if_refused()
        run.resume(resumed_at, config)
    return plan, run, orders


def check_exactly_continued(data):
    """E1, E2: over the final lineage each dataset gave its samples from 0 on, each once."""
    plan, run, _ = run_history(data, may_break=False)
    consumed = {}
    for step in run.steps:
        for _, dataset, index in step:
            consumed.setdefault(dataset, []).append(index)
    assert all(indices == list(range(len(indices))) for indices in consumed.values())
    table = plan.train.state.segments
    positions = [table.positions(step) for step in range(1, len(run.steps) + 1)]
    assert [p for step in positions for p in step] == list(range(plan.train.state.next_position))


def check_broken_on_the_record(data):
    """Between two accepted changes E1 and E2 hold, from where the new order was entered.

    And the last plan still says of every step of its lineage what it said when it was taken.
    """
    plan, run, orders = run_history(data, may_break=True)
    consumed = {}
    for number, batch in enumerate(run.steps, start=1):
        planned = list(planned_samples(plan, number))
        assert [one[:2] for one in planned] == [one[1:] for one in batch]
        assert all(orders[number][one[0]] == one[2:] for one in planned)
        for era, dataset, index in batch:
            consumed.setdefault((era, dataset), []).append(index)
    for indices in consumed.values():
        assert indices == list(range(indices[0], indices[0] + len(indices)))


@given(st.data())
@settings(max_examples=700)
def test_no_sample_is_repeated_or_skipped_whatever_happens(data):
    check_exactly_continued(data)


@given(st.data())
@settings(max_examples=500)
def test_what_was_consumed_is_unchanged_by_whatever_comes_later(data):
    check_broken_on_the_record(data)


@pytest.mark.matrix
@pytest.mark.parametrize("check", [check_exactly_continued, check_broken_on_the_record])
def test_thousands_of_histories(check):
    settings(max_examples=5000)(given(st.data())(check))()


@given(st.data(), configs(), st.lists(st.integers(1, 4), min_size=1, max_size=6))
@settings(max_examples=200)
def test_stops_do_not_show(data, config, stops):
    """E3: a run that was killed again and again has the very table of one that never stopped."""
    undisturbed = plan_resume(config.wanted(), None)
    plan = undisturbed
    for number in stops:
        numerics = {
            "micro batch": data.draw(st.integers(1, 4)),
            "data-parallel size": data.draw(st.integers(1, 4)),
        }
        found = Found(path="/save", record=ledger_after(plan, number), numerics={"micro batch": 2})
        plan = plan_resume(config.wanted(numerics=numerics), found)
        assert plan.kind == "continue"
    assert plan.train.state.segments == undisturbed.train.state.segments
    assert plan.orders == undisturbed.orders
    assert plan.train.state.next_position == sum(stops) * config.batch_size


@given(st.data(), configs(), st.integers(0, 5))
@settings(max_examples=200)
def test_the_same_command_again_plans_the_same(data, config, number):
    """A launch that dies before its first checkpoint is planned once more, to the same end."""
    ledger = ledger_after(plan_resume(config.wanted(), None), number)
    changed = data.draw(changes(config, may_break=True))
    found = Found(path="/save", record=ledger)
    assert plan_resume(changed.wanted(), found) == plan_resume(changed.wanted(), found)
    # and so is one that left a checkpoint before its first step
    plan = plan_resume(changed.wanted(), found)
    again = Found(path="/save", record=ledger_after(plan, 0))
    assert plan_resume(changed.wanted(), again).streams == plan.streams


@given(st.data())
@settings(max_examples=200)
def test_evaluations_consume_every_validation_sample_once(data):
    """Whatever becomes of eval_iters, batch size, data and training, kills included."""
    datasets = st.sampled_from([("dddd",), ("eeee",), ("dddd", "cccc"), ("cccc", "dddd")])
    consumed, taken = [], {}
    found = None
    for _ in range(data.draw(st.integers(1, 5))):
        config = data.draw(configs())
        chosen = data.draw(datasets)
        iters = data.draw(st.integers(0, 3))
        valid = new_order(chosen, (1.0,) * len(chosen), 9, seq_length=4, seed=1234)
        wanted = config.wanted(
            orders={"train": Config().order(), "valid": valid},
            datasets=NOTES,
            eval_interval=2,
            eval_iters=iters,
        )
        plan = plan_resume(wanted, found)
        plan.raise_if_refused()
        stream = plan.streams.get("valid")
        assert (stream is not None and stream.is_read) == (iters > 0)
        evaluations = data.draw(st.integers(0, 4)) if iters else 0
        for number in range(evaluations):
            positions = stream.state.segments.positions(stream.next_step + number)
            assert len(positions) == iters * config.batch_size
            consumed += positions
            start = stream.order_position + positions.start - stream.state.next_position
            for key, index in order_samples(stream.order, start, start + len(positions)):
                assert index == taken.get(key, 0)
                taken[key] = index + 1
        found = Found(path="/save", record=ledger_after(plan, 1, evaluations=evaluations))
    assert consumed == list(range(len(consumed)))
