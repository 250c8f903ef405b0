"""How far attempts came, and which of them came to nothing."""

import pytest

from megatron.ledger.queries.advance import advances, attempts_without_advance
from tests.ledger.queries.simulated_run import SimulatedRun, write_corpus


@pytest.fixture
def run(tmp_path):
    return SimulatedRun(tmp_path / "save", [write_corpus(tmp_path / "corpus")])


def advanced(run):
    return [one.has_advanced for one in advances(run.save)]


def stalled(run):
    return [one.facts.number for one in attempts_without_advance(advances(run.save))]


def test_a_step_that_no_attempt_had_recorded_is_an_advance(run):
    run.launch(7, saves=[5], stop="failed: RuntimeError")
    run.launch(6, stop="failed: RuntimeError")
    run.launch(8, stop="failed: RuntimeError")
    assert advanced(run) == [True, False, True]
    assert stalled(run) == []


def test_deaths_in_one_step_count_from_the_first_of_them(run):
    run.launch(7, saves=[5], stop="failed: DatasetError")
    assert stalled(run) == []
    run.launch(7, stop="failed: DatasetError")
    run.launch(7, stop="failed: DatasetError")
    assert [list(one.died_in) for one in advances(run.save)] == [[8], [8], [8]]
    assert stalled(run) == [1, 2, 3]


def test_a_death_elsewhere_before_them_is_none_of_them(run):
    run.launch(9, saves=[5], stop="failed: RuntimeError")
    run.launch(7, stop="failed: DatasetError")
    run.launch(7, stop="failed: DatasetError")
    assert stalled(run) == [2, 3]


def test_who_was_killed_died_within_the_lines_that_were_not_written(run):
    run.launch(7, saves=[5], stop=None)  # lines are written every 5 steps here
    [killed] = advances(run.save)
    assert (killed.last_step, killed.died_in) == (5, range(6, 16))
    run.launch(7, stop="failed: DatasetError")
    assert advanced(run) == [True, True]


def test_attempts_that_were_told_to_stop_count_neither_way(run):
    run.launch(7, saves=[5], stop="failed: DatasetError")
    run.launch(5, stop="signal SIGTERM")
    run.launch(7, stop="failed: DatasetError")
    assert stalled(run) == [1, 3]
    assert advances(run.save)[1].died_in is None


def test_a_rollback_begins_anew(run):
    run.launch(12, saves=[5, 10], stop="finished")
    run.launch(7, iteration=5, stop="failed: RuntimeError")
    assert advanced(run) == [True, False]
    assert [one.facts.obeyed for one in advances(run.save)] == [False, False]
