"""Plans in words and as JSON."""

import json
import re
from dataclasses import replace

import pytest

from megatron.ledger.planning import Counting, Found, plan_json, plan_resume
from megatron.ledger.planning.plan_json import plan_to_json
from megatron.ledger.planning.report import report_lines, summary_lines
from tests.ledger.planning.slow_run import Config
from tests.ledger.planning.slow_world import SlowSource, ledger_after
from tests.ledger.planning.test_plan import evaluated, evaluated_found, foreign

_CONFIG = Config(datasets=("aaaa", "bbbb"), weights=(1.0, 1.0), batch_size=4, train_iters=20)
_COUNTING = Counting(open_order=SlowSource, counts_neox=True)


def _found(steps=7):
    return Found(
        path=f"/save/global_step{steps}",
        record=ledger_after(plan_resume(_CONFIG.wanted(), None), steps),
        numerics={},
    )


def _plan(**changes):
    return plan_resume(replace(_CONFIG, **changes).wanted(), _found(), _COUNTING)


PLANS = {
    "new": plan_resume(_CONFIG.wanted(), None),
    "continue": _plan(),
    "new_segment": _plan(batch_size=6, weights=(2.0, 1.0)),
    "refuse": _plan(seed=5),
    "accepted": _plan(seed=5, accepts=frozenset({"seed"})),
    "finetune": plan_resume(_CONFIG.wanted(finetune=True), _found()),
    "adopt": plan_resume(evaluated(), Found(path="/neox", record=foreign())),
    "evaluates first": plan_resume(evaluated(), evaluated_found(1, is_due=True)),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_launch_prints_five_lines(plan):
    lines = summary_lines(plan)
    assert [line.split()[0] for line in lines] == ["plan", "data", "changed", "exactness", "note"]
    assert not any("\n" in line for line in lines)


def test_the_five_lines_of_a_changed_run():
    assert summary_lines(PLANS["new_segment"]) == [
        "plan       continues /save/global_step7 (run a1b2) with steps 8..20",
        "data       step 8 begins at position 28, sample 0 of order "
        f"{PLANS['new_segment'].train.order.order_id[:12]}; 6 samples per step",
        "changed    weights 0.5, 0.5 -> 0.666667, 0.333333; train_batch_size 4 -> 6",
        "exactness  data exact: nothing is repeated, nothing skipped; numbers those of a run with "
        "other data from here on",
        "note       no validation data is read",
    ]


def test_the_note_tells_what_comes_first_and_what_is_left_behind():
    note = summary_lines(PLANS["evaluates first"])[-1]
    assert note == "note       the evaluation due after step 7 comes first"
    found = replace(_found(), newest_step=19, reason="iteration: 7 was asked for")
    note = summary_lines(plan_resume(_CONFIG.wanted(is_recorded=False), found))[-1]
    assert "steps 8..19 were taken before and stay as an abandoned branch" in note
    assert "iteration: 7 was asked for" in note
    assert "nothing is recorded: save is not set" in note


def test_the_report_says_what_neox_would_do():
    text = "\n".join(report_lines(PLANS["new_segment"]))
    assert "NeoX would\n  go on at sample 42 (7 steps x 6); 28 are consumed" in text
    assert re.search(r"repeated +\d", text)
    assert "train_batch_size 4 -> 6: from step 8 on, exact" in text
    assert "/data/a: weight 0.666667, from its sample 14, content aaaa" in text
    text = "\n".join(report_lines(PLANS["continue"]))
    assert "repeat nothing and skip nothing" in text


def test_the_report_of_a_refusal_ends_with_the_way_out():
    lines = report_lines(PLANS["refuse"])
    assert "What the change of data costs" in lines
    assert lines[-1].endswith("accept_data_change: [seed]")


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_json_has_the_documented_members_and_no_others(plan):
    values = plan_to_json(plan)
    assert set(json.loads(json.dumps(values))) == set(values)
    documented = set(re.findall(r"[a-z_]+", plan_json.__doc__.split("format  ", 1)[1])) | {"format"}
    assert set(values) <= documented
    assert set(values["streams"]["train"]) <= documented


def test_json_tells_the_counts():
    values = plan_to_json(PLANS["refuse"])
    counts = values["data_break"]["counts"]
    assert counts["repeated"]["tokens"] == PLANS["refuse"].data_break.comparison.repeated.tokens
    assert values["exit_status"] == 1
    assert values["data_break"]["keys"] == ["seed"]
