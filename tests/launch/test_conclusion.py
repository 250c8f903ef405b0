"""One status and one last word for a whole job."""

import json
import signal
from dataclasses import replace

from megatron.base.exit_codes import FINISHED, HUNG, NODE_LOST, STOPPED
from megatron.engine.launch.conclusion import JobEnd
from megatron.engine.launch.failures import RankEnd
from megatron.engine.launch.rank_process import Exit

FINE = RankEnd(0, 100, Exit(0), 20.0, None, False, "")
SAVED = RankEnd(1, 101, Exit(STOPPED), 20.0, None, False, "")
OWN_ERROR = RankEnd(2, 102, Exit(3), 10.0, 9.9, False, "Traceback\nValueError: boom\n", "two")
PEER_ERROR = RankEnd(3, 103, Exit(1), 10.3, 10.2, False, "Traceback\nConnectionError\n", "one")
TOLD = RankEnd(4, 104, Exit(None, signal.SIGTERM), 12.0, None, True, "")
LOST = ("two: no sign of life for 30 s",)


def test_all_is_well_only_if_every_rank_ended_with_0():
    assert (JobEnd((FINE,)).status, JobEnd((FINE,)).report()) == (FINISHED, "")
    assert JobEnd((FINE, SAVED)).status == STOPPED
    assert JobEnd((FINE, OWN_ERROR, SAVED)).status == 3
    assert JobEnd((FINE,), lost=LOST).status == NODE_LOST


def test_a_job_that_stopped_says_by_which_signal():
    stopped = JobEnd((SAVED,), wishes=(signal.SIGUSR1,))
    assert stopped.report().startswith("deepy: stopped on purpose (SIGUSR1); the same command")
    assert JobEnd((SAVED,)).report().startswith("deepy: stopped on purpose; the same command")


def test_ranks_that_ended_by_a_wish_are_no_failure():
    by_signal = replace(TOLD, was_told=False)
    end = JobEnd((by_signal,), wishes=(signal.SIGTERM,))
    assert (end.status, end.report()) == (143, "deepy: stopped by SIGTERM after 12.0 s\n")


def test_a_lost_node_explains_what_other_ranks_complain_of():
    end = JobEnd((PEER_ERROR, TOLD), lost=LOST)
    assert end.status == NODE_LOST
    assert end.report() == (
        "---- deepy: lost two: no sign of life for 30 s\n"
        "---- first to notice: rank 3 on one: exit code 1\nTraceback\nConnectionError\n"
        "---- the job ends with status 77\n"
    )
    assert JobEnd((TOLD,), lost=LOST).status == NODE_LOST


def test_an_error_of_a_ranks_own_comes_before_the_loss_of_a_node():
    end = JobEnd((OWN_ERROR, TOLD), lost=LOST)
    assert end.status == 3
    assert "---- rank 2 on two: exit code 3" in end.report()


def test_a_hang_is_told_rather_than_how_its_ranks_were_ended():
    end = JobEnd((TOLD,), hang="rank 4: 61 s in step 12")
    assert end.status == HUNG
    assert "no progress: rank 4: 61 s in step 12" in end.report()


def test_peers_of_a_rank_that_was_stopped_while_it_started_have_not_failed():
    early = replace(SAVED, ended_at=10.0)
    assert JobEnd((early, PEER_ERROR), wishes=(signal.SIGTERM,)).status == STOPPED
    assert JobEnd((replace(SAVED, ended_at=11.0), PEER_ERROR)).status == 1
    assert JobEnd((early, replace(OWN_ERROR, ended_at=10.5))).status == 3


def test_how_a_rank_ended_goes_from_node_to_node():
    for end in (FINE, PEER_ERROR, TOLD):
        assert RankEnd.from_fields(json.loads(json.dumps(end.as_fields()))) == end
    long = replace(PEER_ERROR, excerpt="x" * 100_000 + "the cause")
    assert RankEnd.from_fields(long.as_fields()).excerpt.endswith("xthe cause")
    assert len(long.as_fields()["excerpt"]) == 1 << 16
