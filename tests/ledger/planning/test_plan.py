"""What each change does on resume, by example."""

from dataclasses import replace

import pytest

from megatron.base.errors import CheckpointError, ConfigError
from megatron.ledger.ledger_file import DatasetNote, TokenizerIdentity
from megatron.ledger.planning import (
    Counting,
    ForeignCheckpoint,
    Found,
    LearningRates,
    plan_resume,
)
from megatron.ledger.planning.past import Past
from megatron.stream.segments import Segment, SegmentTable
from tests.ledger.planning.slow_run import Config
from tests.ledger.planning.slow_world import (
    NOTES,
    SlowSource,
    component,
    consumed_tokens,
    ledger_after,
    new_order,
    order,
    order_samples,
)

_CONFIG = Config(datasets=("aaaa", "bbbb"), weights=(1.0, 1.0), batch_size=4, train_iters=20)
_COUNTING = Counting(open_order=SlowSource, counts_neox=True)
_BPE = TokenizerIdentity(type="GPT2BPETokenizer", files=("11", "22"))


def found_after(steps, config=_CONFIG, *, before=None, **wanted):
    """Return the checkpoint after so many steps of a new run (or on top of an earlier one)."""
    plan = plan_resume(config.wanted(**wanted), before)
    plan.raise_if_refused()
    step = plan.step + steps
    return Found(path=f"/save/global_step{step}", record=ledger_after(plan, steps))


def names(plan):
    return {change.name for change in plan.changes}


def test_without_a_checkpoint_a_run_begins_at_position_0_with_neoxs_head():
    plan = plan_resume(_CONFIG.wanted(), None)
    assert (plan.kind, plan.next_step, plan.exit_status) == ("new", 1, 0)
    assert plan.train.order == _CONFIG.order()
    assert list(plan.train.state.segments.positions(2)) == [4, 5, 6, 7]


def test_nothing_changed_goes_on_in_the_same_segment():
    plan = plan_resume(_CONFIG.wanted(), found_after(7))
    assert plan.kind == "continue"
    assert plan.changes == ()
    assert (plan.next_step, plan.train.state.next_position) == (8, 28)
    assert len(plan.train.state.segments.segments) == 1


def test_another_batch_size_begins_a_segment_at_the_next_position():
    plan = plan_resume(replace(_CONFIG, batch_size=6).wanted(), found_after(7))
    assert plan.kind == "new_segment"
    last = plan.train.state.segments.segments[-1]
    assert (last.first_step, last.batch_size, last.first_position) == (8, 6, 28)
    assert last.first_order_position == 28
    assert [str(change) for change in plan.changes] == ["train_batch_size 4 -> 6"]


def test_more_steps_leave_the_order_and_its_head_alone():
    found = found_after(7)
    plan = plan_resume(replace(_CONFIG, train_iters=200).wanted(), found)
    assert plan.kind == "continue"
    assert plan.train.order == _CONFIG.order()
    assert plan.train.order != replace(_CONFIG, train_iters=200).order()


def test_content_that_lies_elsewhere_is_the_same_dataset():
    moved = {**NOTES, "aaaa": replace(NOTES["aaaa"], path="/new/place")}
    plan = plan_resume(_CONFIG.wanted(datasets=moved), found_after(7))
    assert plan.kind == "continue"
    assert [str(change) for change in plan.changes] == [
        "dataset /data/a -> /new/place, content aaaa"
    ]
    assert plan.datasets["aaaa"].path == "/new/place"


def test_datasets_that_change_names_are_not_changed_content():
    swapped = {
        "aaaa": replace(NOTES["aaaa"], path="/data/b"),
        "bbbb": replace(NOTES["bbbb"], path="/data/a"),
    }
    plan = plan_resume(_CONFIG.wanted(datasets=swapped), found_after(7))
    assert plan.kind == "continue"


def test_a_changed_blend_goes_on_from_every_datasets_cursor():
    found = found_after(7)
    plan = plan_resume(replace(_CONFIG, weights=(2.0, 1.0)).wanted(), found)
    assert plan.kind == "new_segment"
    assert [one.start for one in plan.train.order.components] == [14, 14]
    assert plan.train.order_position == 0
    assert [str(change) for change in plan.changes] == ["weights 0.5, 0.5 -> 0.666667, 0.333333"]
    # and back again: the draws count from there, the cursors go on
    found = found_after(3, replace(_CONFIG, weights=(2.0, 1.0)), before=found)
    back = plan_resume(_CONFIG.wanted(), found)
    assert [one.start for one in back.train.order.components] == [14 + 8, 14 + 4]
    assert len(back.train.state.segments.segments) == 3


def test_a_dataset_that_returns_goes_on_where_it_was_left():
    found = found_after(7)
    only_a = replace(_CONFIG, datasets=("aaaa",), weights=(1.0,))
    found = found_after(2, only_a, before=found)
    assert found.record.streams["train"].cursors["bbbb:0-4#0"] == 14
    plan = plan_resume(_CONFIG.wanted(), found)
    assert "dataset returned" in names(plan)
    a, b = plan.train.order.components
    assert (a.start, b.start) == (14 + 8, 14)
    assert b.head_epochs == _CONFIG.order().components[1].head_epochs


def test_an_added_dataset_begins_with_its_first_tail_block():
    three = replace(_CONFIG, datasets=("aaaa", "bbbb", "cccc"), weights=(1.0, 1.0, 1.0))
    plan = plan_resume(three.wanted(), found_after(7))
    added = plan.train.order.components[2]
    assert (added.dataset, added.head_epochs, added.start) == ("cccc", None, 0)
    assert {"dataset added", "weights"} == names(plan)


def test_datasets_in_another_sequence_are_drawn_anew():
    plan = plan_resume(replace(_CONFIG, datasets=("bbbb", "aaaa")).wanted(), found_after(7))
    assert names(plan) == {"datasets reordered"}
    assert [one.start for one in plan.train.order.components] == [14, 14]


def test_several_changes_at_once_make_one_segment():
    now = replace(
        _CONFIG, batch_size=6, weights=(3.0, 1.0), train_iters=50, datasets=("aaaa", "cccc")
    )
    plan = plan_resume(now.wanted(), found_after(7))
    assert len(plan.train.state.segments.segments) == 2
    assert {"train_batch_size", "dataset added", "dataset removed"} <= names(plan)
    assert plan.exit_status == 0


def brute_force(before, after, steps, batch_size, enters_at):
    """Count the tokens of the remaining steps one by one: (repeated, skipped)."""
    at = before.record.streams["train"].next_position
    old = before.record.orders[before.record.streams["train"].segments.at_step(1).order_id]
    undisturbed = consumed_tokens(old, order_samples(old, at, at + steps * batch_size))
    instead = consumed_tokens(
        after, order_samples(after, enters_at, enters_at + steps * batch_size)
    )
    return instead - undisturbed, undisturbed - instead


@pytest.mark.parametrize(
    ("change", "enters_at"),
    [({"seed": 99}, 28), ({"seq_length": 6}, 18), ({"seed": 5, "seq_length": 3}, 37)],
)
def test_a_new_seed_or_length_is_refused_with_what_it_would_repeat_and_skip(change, enters_at):
    found = found_after(7)
    now = replace(_CONFIG, **change)
    plan = plan_resume(now.wanted(), found, _COUNTING)
    repeated, skipped = brute_force(found, now.order(), 13, 4, enters_at)
    assert (plan.kind, plan.exit_status) == ("refuse", 1)
    assert plan.data_break.enters_at == enters_at
    assert plan.data_break.neox_enters_at == 28
    counted = plan.data_break.comparison
    assert counted.repeated.tokens == repeated.total() > 0
    assert counted.skipped.tokens == skipped.total() > 0
    assert counted.repeated.documents == len({token[:2] for token in repeated})
    assert not counted.new
    with pytest.raises(ConfigError) as caught:
        plan.raise_if_refused()
    message = str(caught.value)
    assert "/save/global_step7 cannot go on exactly after step 7" in message
    assert f"repeated: {counted.repeated}" in message
    assert f"skipped:  {counted.skipped}" in message
    assert f"entered at its sample {enters_at}" in message
    assert f"accept_data_change: [{', '.join(change)}]" in message


def test_an_accepted_change_goes_on_in_the_new_order_and_stays_on_the_record():
    found = found_after(7)
    now = replace(_CONFIG, seed=99, accepts=frozenset({"seed"}))
    plan = plan_resume(now.wanted(), found, _COUNTING)
    plan.raise_if_refused()
    assert plan.kind == "new_segment"
    assert plan.train.order == now.order()
    assert plan.train.order_position == 28
    (accepted,) = plan.accepted
    assert (accepted.after_step, accepted.keys, accepted.horizon_step) == (7, ("seed",), 20)
    assert accepted.repeated.tokens == plan.data_break.comparison.repeated.tokens
    assert accepted.is_exact
    assert plan.data_exactness == "not exact from step 8 on, as accepted: seed"
    # later launches have nothing to accept, and the ledger still says so
    found = Found(path="/save", record=ledger_after(plan, 2))
    again = plan_resume(now.wanted(), found)
    assert again.kind == "continue"
    assert again.accepted == plan.accepted
    assert "the data was changed (seed)" in found.record.exactness


def test_accepting_one_change_does_not_accept_another():
    now = replace(_CONFIG, seed=99, seq_length=6, accepts=frozenset({"seed"}))
    plan = plan_resume(now.wanted(), found_after(7), _COUNTING)
    with pytest.raises(
        ConfigError,
        match=r"return to the old seq_length; .*accept_data_change: \[seed, seq_length\]",
    ):
        plan.raise_if_refused()


def test_what_accept_data_change_does_not_know_is_refused():
    plan = plan_resume(replace(_CONFIG, accepts=frozenset({"sead"})).wanted(), None)
    with pytest.raises(ConfigError, match=r"\[sead\] is not known; use seed, seq_length, split"):
        plan.raise_if_refused()


def split_orders(stop, datasets="aaaa"):
    """Return train and validation orders of one dataset that is divided at a document."""
    return {
        "train": order(component(datasets, documents=(0, stop))),
        "valid": order(component(datasets, documents=(stop, 7))),
    }


def test_another_split_is_refused_and_documents_never_dealt_to_train_are_new():
    single = Config(datasets=("aaaa",), train_iters=20)
    evaluations = {"eval_interval": 5, "eval_iters": 1}
    found = found_after(7, single, orders=split_orders(5), **evaluations)
    plan = plan_resume(single.wanted(orders=split_orders(6), **evaluations), found, _COUNTING)
    assert plan.kind == "refuse"
    assert plan.data_break.keys == ("split",)
    assert "split: documents 0..4 -> 0..5" in plan.problems[0]
    assert plan.data_break.comparison.new.documents == 1


def test_a_split_that_moves_documents_between_the_others_needs_no_leave():
    single = Config(datasets=("aaaa",), train_iters=20)
    orders = split_orders(5)
    evaluations = {"eval_interval": 5, "eval_iters": 1}
    found = found_after(7, single, orders=orders, **evaluations)
    orders = {**orders, "valid": order(component("aaaa", documents=(5, 6)))}
    plan = plan_resume(single.wanted(orders=orders, **evaluations), found)
    assert plan.kind == "new_segment"
    assert plan.streams["valid"].order.components[0].head_epochs == 1
    assert plan.train.order == orders["train"]


def test_other_content_under_a_known_path_is_refused():
    found = found_after(7)
    changed = {**NOTES, "eeee": replace(NOTES["eeee"], path="/data/b")}
    now = replace(_CONFIG, datasets=("aaaa", "eeee"))
    plan = plan_resume(now.wanted(datasets=changed), found, _COUNTING)
    assert plan.data_break.keys == ("data",)
    assert "data: /data/b holds other content: bbbb -> eeee" in plan.problems[0]
    new = plan.data_break.comparison.new
    assert new.tokens == 13 * 4 // 2 * 4
    assert new.documents == 3


def test_content_that_is_gone_is_counted_as_far_as_samples_tell():
    single = Config(datasets=("bbbb",), train_iters=20)
    changed = {"eeee": replace(NOTES["eeee"], path="/data/b")}

    def open_order(one):
        if one.components[0].dataset == "bbbb":
            raise CheckpointError("/data/b holds other content now")
        return SlowSource(one)

    now = replace(single, datasets=("eeee",), accepts=frozenset({"data"}))
    plan = plan_resume(
        now.wanted(datasets=changed), found_after(7, single), Counting(open_order=open_order)
    )
    skipped = plan.data_break.comparison.skipped
    assert (skipped.tokens, skipped.documents) == (13 * 4 * 4, None)
    (accepted,) = plan.accepted
    assert not accepted.is_exact
    assert (accepted.skipped.tokens, accepted.skipped.documents) == (13 * 4 * 4, 4)


def test_another_dataset_under_another_path_replaces_the_old_one():
    single = Config(datasets=("bbbb",), train_iters=20)
    plan = plan_resume(replace(single, datasets=("eeee",)).wanted(), found_after(7, single))
    assert plan.kind == "new_segment"
    assert names(plan) == {"dataset added", "dataset removed"}


def test_another_tokenizer_repeats_nothing_and_is_refused_all_the_same():
    found = found_after(7)
    found = replace(found, record=replace(found.record, tokenizer=_BPE))
    same = plan_resume(_CONFIG.wanted(tokenizer=_BPE), found, _COUNTING)
    assert same.kind == "continue"
    other = replace(_BPE, files=("11", "33"))
    plan = plan_resume(_CONFIG.wanted(tokenizer=other), found, _COUNTING)
    assert plan.kind == "refuse"
    assert not plan.data_break.comparison
    assert "tokenizer: GPT2BPETokenizer: the content of its files is another" in plan.problems[0]
    accepted = plan_resume(
        replace(_CONFIG, accepts=frozenset({"tokenizer"}), weights=(2.0, 1.0)).wanted(
            tokenizer=other
        ),
        found,
        _COUNTING,
    )
    accepted.raise_if_refused()
    assert [one.start for one in accepted.train.order.components] == [14, 14]
    assert accepted.accepted[0].repeated.tokens == 0


def evaluated(config=_CONFIG, *, datasets=("dddd",), seq_length=4, seed=1234, **keys):
    weights = (1.0,) * len(datasets)
    valid = new_order(datasets, weights, 10, seq_length=seq_length, seed=seed)
    return config.wanted(
        **{
            "orders": {"train": config.order(), "valid": valid, "test": valid},
            "datasets": NOTES,
            "eval_interval": 5,
            "eval_iters": 2,
            **keys,
        }
    )


def evaluated_found(evaluations, *, is_due=False):
    plan = plan_resume(evaluated(), None)
    ledger = ledger_after(plan, 7, evaluations=evaluations, is_due=is_due)
    return Found(path="/save/global_step7", record=ledger)


def test_validation_goes_on_from_its_own_cursor():
    plan = plan_resume(evaluated(), evaluated_found(3))
    valid = plan.streams["valid"]
    assert (plan.kind, valid.next_step, valid.state.next_position) == ("continue", 4, 24)
    assert plan.streams["test"].state.next_position == 0


def test_other_evaluation_settings_only_move_on_from_the_cursor():
    plan = plan_resume(evaluated(eval_iters=5, eval_interval=3), evaluated_found(3))
    plan.raise_if_refused()
    valid = plan.streams["valid"]
    assert list(valid.state.segments.positions(4)) == list(range(24, 44))
    assert len(plan.train.state.segments.segments) == 1
    assert "valid: samples per evaluation 8 -> 20" in [str(change) for change in plan.changes]


def test_the_batch_size_changes_evaluations_too_and_is_told_once():
    plan = plan_resume(evaluated(replace(_CONFIG, batch_size=6)), evaluated_found(3))
    assert len(plan.streams["valid"].state.segments.positions(4)) == 12
    assert [str(change) for change in plan.changes] == ["train_batch_size 4 -> 6"]


def test_a_new_validation_set_begins_with_its_head_and_needs_no_leave():
    plan = plan_resume(evaluated(datasets=("dddd", "eeee")), evaluated_found(3))
    plan.raise_if_refused()
    known, new = plan.streams["valid"].order.components
    assert (known.start, new.start) == (24, 0)
    assert new.head_epochs is not None
    changed = {**NOTES, "eeee": replace(NOTES["eeee"], path="/data/d")}
    replaced = replace(evaluated(datasets=("eeee",)), datasets=changed)
    plan_resume(replaced, evaluated_found(3)).raise_if_refused()


def test_an_evaluation_that_is_due_comes_first():
    plan = plan_resume(evaluated(), evaluated_found(1, is_due=True))
    assert plan.evaluates_first
    assert plan.streams["valid"].next_step == 2
    none = plan_resume(evaluated(eval_iters=0), evaluated_found(1, is_due=True))
    assert not none.evaluates_first
    assert not none.streams["valid"].is_read


def test_validation_that_rests_goes_on_when_it_is_read_again():
    resting = plan_resume(evaluated(eval_iters=0), evaluated_found(3))
    found = Found(path="/save", record=ledger_after(resting, 2))
    plan = plan_resume(evaluated(), found)
    assert plan.streams["valid"].state.next_position == 24
    assert plan.streams["valid"].next_step == 4


def test_with_a_new_seed_validation_too_goes_on_after_as_many_tokens():
    now = replace(_CONFIG, seed=9, seq_length=3, accepts=frozenset({"seed", "seq_length"}))
    plan = plan_resume(evaluated(now, seed=9, seq_length=3), evaluated_found(3), _COUNTING)
    assert plan.streams["valid"].order_position == 24 * 4 // 3
    assert plan.streams["valid"].order.seed == 9


def test_finetuning_is_a_new_run_from_position_0():
    plan = plan_resume(_CONFIG.wanted(finetune=True), found_after(7))
    assert (plan.kind, plan.step, plan.source_step) == ("finetune", 0, 7)
    assert plan.train.state.next_position == 0
    assert plan.run_id == "a1b2"  # the parent's


def test_a_roll_back_names_the_branch_it_leaves():
    plan = plan_resume(_CONFIG.wanted(), replace(found_after(7), newest_step=19))
    assert plan.abandoned == (8, 19)
    assert plan.train.state.next_position == 28


def test_a_position_inside_a_step_is_no_ledger():
    found = found_after(7)
    state = found.record.streams["train"]
    record = replace(found.record, streams={"train": replace(state, next_position=29)})
    with pytest.raises(CheckpointError, match="next position 29 is inside step 8"):
        plan_resume(_CONFIG.wanted(), replace(found, record=record))


def foreign(**values):
    valid = order(component("dddd", head_epochs=2))
    return ForeignCheckpoint(
        **{
            "step": 25,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "data_parallel_size": 1,
            "eval_interval": 10,
            "eval_iters": 2,
            "orders": {"train": order(component("aaaa", head_epochs=40)), "valid": valid},
            "datasets": NOTES,
            **values,
        }
    )


def test_a_foreign_checkpoint_is_adopted_with_what_it_really_consumed():
    config = Config(datasets=("aaaa",), batch_size=8, train_iters=60)
    wanted = config.wanted(
        orders=foreign().orders,
        eval_interval=10,
        eval_iters=2,
        gradient_accumulation_steps=4,
        datasets=NOTES,
    )
    found = Found(path="/neox/global_step25", record=foreign(assumed=("the tokenizer",)))
    plan = plan_resume(wanted, found, _COUNTING)
    assert (plan.kind, plan.step, plan.train.state.next_position) == ("adopt", 25, 200)
    # 2 evaluations of 2 x 4 micro batches of 2; NeoX would go on at micro batch 20, not 16
    valid = plan.streams["valid"]
    assert (valid.next_step, valid.state.next_position) == (3, 2 * 2 * 4 * 2)
    assert not plan.evaluates_first
    assert plan.neox_notes == (
        "validation: NeoX would go on at sample 40 (micro batch 20), 32 were consumed",
    )
    assert plan.adopted.step == 25
    assert "the tokenizer" in plan.adopted.assumed
    assert "steps 1..25 are computed, not observed" in plan.data_exactness


def test_an_adopted_run_that_outran_its_index_maps_says_so():
    short = foreign(orders={"train": order(component("aaaa", head_epochs=2))}, step=3)
    config = Config(datasets=("aaaa",), batch_size=8, train_iters=60)
    plan = plan_resume(config.wanted(), Found(path="/neox", record=short), _COUNTING)
    assert plan.adopted.assumed[-1] == (
        "11 samples of /data/a came after the 13 of NeoX's index maps, from a new epoch; NeoX "
        "starts over there"
    )


def test_the_first_attempt_after_an_adoption_may_change_things_too():
    config = Config(datasets=("aaaa",), batch_size=4, train_iters=60)
    plan = plan_resume(config.wanted(), Found(path="/neox", record=foreign()))
    assert plan.kind == "adopt"
    assert [one.first_step for one in plan.train.state.segments] == [1, 26]
    assert plan.train.order.components[0].head_epochs == 40


def rates(end_iter):
    values = {"start_lr": 1e-3, "end_iter": end_iter, "decay_style": "linear"}
    return LearningRates(values=values, at=lambda count: 1e-3 * max(0.0, 1 - count / end_iter))


def test_another_learning_rate_schedule_is_refused_with_both_at_five_steps():
    found = replace(found_after(7), learning_rates=rates(20), optimizer_steps=6)
    longer = replace(_CONFIG, train_iters=40)
    plan = plan_resume(longer.wanted(learning_rates=rates(40)), found)
    assert plan.kind == "refuse"
    (problem,) = plan.problems
    assert "end_iter 20 in the checkpoint, 40 configured" in problem
    assert "step         8: 7.000000e-04 -> 8.500000e-04" in problem
    assert "step        41: 0.000000e+00 -> 2.500000e-05" in problem
    assert problem.count("    step ") == 5
    for key in ("lr_decay_iters: 20", "override_lr_scheduler", "use_checkpoint_lr_scheduler"):
        assert key in problem


@pytest.mark.parametrize(
    "keys",
    [
        {"learning_rates": rates(20)},
        {"learning_rates": rates(40), "schedule_choice": "configured"},
        {"learning_rates": rates(40), "schedule_choice": "checkpoint"},
        {"learning_rates": rates(40), "restores_optimizer": False},
        {"learning_rates": rates(40), "finetune": True},
    ],
)
def test_a_schedule_that_is_the_same_or_chosen_goes_on(keys):
    plan = plan_resume(_CONFIG.wanted(**keys), replace(found_after(7), learning_rates=rates(20)))
    plan.raise_if_refused()


def test_the_plan_says_how_far_numbers_are_the_same():
    found = replace(found_after(7), numerics={"tensor parallel": 1, "threads": 1})

    def numbers(numerics, **wanted):
        return plan_resume(_CONFIG.wanted(numerics=numerics, **wanted), found).numbers_exactness

    assert numbers({"tensor parallel": 1}) == "bitwise those of an undisturbed run"
    assert numbers({"tensor parallel": 2}) == "equal to rounding (tensor parallel 1 -> 2)"
    assert "no_load_rng" in numbers({}, restores_random_state=False)
    imported = replace(found, foreign_state=("Adam's moments are zeros",))
    assert plan_resume(_CONFIG.wanted(), imported).numbers_exactness == (
        "not those of an undisturbed run (Adam's moments are zeros)"
    )
    unknown = plan_resume(_CONFIG.wanted(), found_after(7))
    assert "are not known" in unknown.numbers_exactness


@pytest.mark.parametrize(
    ("datasets", "is_replaced"),
    [(("cccc",), True), (("cccc", "dddd"), True), (("aaaa", "cccc"), False), (("bbbb",), False)],
)
def test_it_is_said_if_no_dataset_is_left(datasets, is_replaced):
    config = Config(datasets=datasets, weights=(1.0,) * len(datasets), batch_size=4, train_iters=20)
    plan = plan_resume(config.wanted(), found_after(7))
    assert plan.kind == "new_segment"
    assert any("what was read of it comes again" in one for one in plan.notices) == is_replaced


def test_an_elastic_batch_is_told_with_what_it_was_divided_into():
    found = replace(found_after(7), division=(2, 1, 2))
    assert _CONFIG.wanted().division is None

    def notices(found, division):
        plan = plan_resume(_CONFIG.wanted(division=division), found)
        assert plan.kind in ("new", "continue")
        return plan.notices

    kept = "elastic_batch: 4 samples = micro batch {} x accumulation {} x {} data-parallel ranks"
    assert kept.format(1, 1, 4) + " (was 2 x 1 x 2)" in notices(found, (1, 1, 4))
    assert kept.format(2, 1, 2) in notices(found, (2, 1, 2))
    assert kept.format(1, 1, 4) in notices(found_after(7), (1, 1, 4))
    assert kept.format(1, 1, 4) in notices(None, (1, 1, 4))


def test_changed_settings_of_a_step_are_named_and_nothing_is_called_equal():
    found = replace(found_after(7), numerics={}, settings={"rotary_pct": 0.25, "warmup": 0.01})
    plan = plan_resume(_CONFIG.wanted(settings={"rotary_pct": 1.0, "warmup": 0.01}), found)
    assert plan.settings == ("rotary_pct 0.25 -> 1.0",)
    assert plan.numbers_exactness == (
        "those of a run with other settings from here on (rotary_pct 0.25 -> 1.0)"
    )
    assert plan.data_exactness == "exact: nothing is repeated, nothing skipped"


def test_keys_without_effect_are_named_as_such():
    found = replace(found_after(7), without_effect={"num_workers": 0, "train_iters": 20})
    plan = plan_resume(_CONFIG.wanted(without_effect={"num_workers": 2, "train_iters": 20}), found)
    assert plan.kind == "continue"
    assert [(str(one), one.effect) for one in plan.changes] == [("num_workers 0 -> 2", "none")]


def test_passes_over_each_dataset_are_told_under_train_epochs():
    wanted = Config(datasets=("cccc",), batch_size=2, train_iters=4).wanted(
        train_epochs=2, epoch_samples={"cccc:0-6#0": 4}
    )
    assert plan_resume(wanted, None).passes == {"/data/c": 2.0}


def test_a_planned_segment_that_no_step_was_taken_of_is_the_present_one():
    """A checkpoint may be written at the step a launch resumed from."""
    first = plan_resume(replace(_CONFIG, weights=(2.0, 1.0)).wanted(), found_after(7))
    found = Found(path="/save/global_step7", record=ledger_after(first, 0))
    assert plan_resume(replace(_CONFIG, weights=(2.0, 1.0)).wanted(), found).kind == "continue"
    back = plan_resume(_CONFIG.wanted(), found)
    assert [one.first_step for one in back.train.state.segments] == [1, 8]
    assert [one.start for one in back.train.order.components] == [14, 14]


def test_tokens_of_all_segments_count():
    table = SegmentTable(
        (
            Segment(
                first_step=1, batch_size=4, first_position=0, order_id="x", first_order_position=0
            ),
            Segment(
                first_step=4, batch_size=2, first_position=12, order_id="y", first_order_position=0
            ),
        )
    )
    found = found_after(7)
    state = replace(found.record.streams["train"], segments=table, next_position=16)
    orders = {
        "x": order(component("aaaa"), seq_length=4),
        "y": order(component("aaaa"), seq_length=7),
    }
    record = replace(found.record, streams={"train": state}, orders=orders)
    past = Past.of(replace(found, record=record))
    assert past.stream("train").consumed_tokens == 12 * 4 + 4 * 7
    assert past.stream("train").steps_done == 5


def test_a_known_level_of_content_is_told():
    notes = {
        **NOTES,
        "aaaa": DatasetNote(path="/data/a", level="sampled", num_documents=7, num_tokens=30),
    }
    plan = plan_resume(_CONFIG.wanted(datasets=notes), found_after(7))
    assert any("known by samples of their bytes only: /data/a" in one for one in plan.notices)
