"""Attempts as a tree, and two runs compared."""

import dataclasses
import math

import pytest

from megatron.ledger.lineage import StepRange
from megatron.ledger.queries.differences import compare_runs
from megatron.ledger.queries.history import history
from megatron.ledger.queries.run_view import open_run
from tests.ledger.queries.histories import blended_run, eventful_run
from tests.ledger.queries.simulated_run import SimulatedRun, write_corpus


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    return eventful_run(tmp_path_factory.mktemp("eventful"))


def test_attempts_hang_below_the_one_they_went_on_from(eventful):
    (first,) = history(open_run(eventful.save))
    assert [child.facts.number for child in first.children] == [2, 3]
    second, third = first.children
    assert [child.facts.number for child in second.children] == [4]
    assert (first.kept, first.abandoned, first.ending) == (StepRange(1, 10), None, "killed")
    assert (second.kept, second.abandoned) == (StepRange(11, 15), StepRange(16, 20))
    assert (third.kept, third.abandoned) == (None, StepRange(11, 15))
    assert first.successor is second
    assert second.ending == "signal"
    assert not third.leads_to_lineage


def test_the_newest_attempt_may_still_be_running(tmp_path):
    run = SimulatedRun(tmp_path / "save", [write_corpus(tmp_path / "corpus")])
    run.launch(6, stop=None)
    (node,) = history(open_run(run.save))
    assert (node.ending, node.is_on_lineage) == ("running, or killed", True)


def test_a_checkpoint_alone_has_no_attempts_to_show(eventful):
    view = open_run(eventful.save / "global_step10")
    assert history(dataclasses.replace(view, save=None)) == []


def test_a_run_reads_what_its_own_past_read(eventful):
    found = compare_runs(open_run(eventful.save), open_run(eventful.save / "global_step15"))
    assert found.reads_the_same
    assert (found.common_ancestor, found.compared) == (15, 15)
    assert found.losses_part_at is None


def test_runs_part_where_the_batch_size_changed(eventful, tmp_path):
    other = SimulatedRun(tmp_path / "save", eventful.datasets)
    other.launch(20, saves=[20], train_iters=12)  # the head that the other run began with
    found = compare_runs(open_run(eventful.save), open_run(other.save))
    assert found.common_ancestor is None
    assert found.samples_part_at == 16
    assert found.reason == ("train_batch_size 4 and 8",)
    assert found.digests_part_at == 16
    assert not found.reads_the_same
    assert math.isclose(found.largest_loss_difference, 0.0)


def test_runs_of_other_data_part_at_once(eventful, tmp_path):
    other = blended_run(tmp_path)
    found = compare_runs(open_run(eventful.save), open_run(other.save))
    assert (found.samples_part_at, found.digests_part_at) == (1, 1)
    assert found.reason[0].startswith("datasets ")


def test_a_misread_step_is_a_difference_though_the_plans_agree(tmp_path):
    corpus = [write_corpus(tmp_path / "corpus")]
    one, other = SimulatedRun(tmp_path / "one", corpus), SimulatedRun(tmp_path / "other", corpus)
    one.launch(9)
    other.launch(9, misread_step=4)
    found = compare_runs(open_run(one.save), open_run(other.save))
    assert (found.samples_part_at, found.digests_part_at) == (None, 4)
    assert not found.reads_the_same
