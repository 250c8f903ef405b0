"""The first failure is told from those that follow from it."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from megatron.engine.launch.failures import RankEnd, failure_report, first_failure
from megatron.engine.launch.rank_process import Exit

FINE = RankEnd(0, 100, Exit(0), 20.0, None, False, "")
KILLED = RankEnd(1, 101, Exit(None, 9), 10.0, None, False, "")
PEER_ERROR = RankEnd(2, 102, Exit(1), 10.3, 10.2, False, "Traceback\nConnectionError\n")


def test_no_rank_failed_if_all_ended_with_0():
    assert first_failure([FINE, replace(FINE, rank=1)]) is None


def test_a_kill_without_a_word_comes_before_the_complaints_of_peers():
    assert first_failure([FINE, PEER_ERROR, KILLED]) is KILLED


def test_the_earlier_traceback_is_first_though_its_process_ends_later():
    slow = replace(KILLED, exit=Exit(1), ended_at=11.0, trace_began_at=9.9)
    assert first_failure([PEER_ERROR, slow]) is slow
    # Even if the launcher's SIGTERM came before its own end; the status is then Python's.
    told = replace(slow, exit=Exit(None, 15), was_told=True)
    assert first_failure([PEER_ERROR, told]) is told
    assert told.status == 1


def test_a_lost_connection_is_not_the_cause_if_another_error_is_seen_just_after_it():
    cause = replace(KILLED, exit=Exit(1), trace_began_at=10.2001, excerpt="Traceback\nKeyError\n")
    assert first_failure([PEER_ERROR, replace(cause, ended_at=10.5)]) is not PEER_ERROR
    late = replace(cause, ended_at=13.0, trace_began_at=12.0)
    assert first_failure([PEER_ERROR, late]) is PEER_ERROR
    assert first_failure([PEER_ERROR, replace(PEER_ERROR, rank=3, trace_began_at=10.25)]).rank == 2


def test_a_traceback_handled_long_ago_is_no_sign_of_failure():
    logged = RankEnd(0, 100, Exit(None, 15), 11.0, -5.0, True, "Traceback\nhandled\n")
    assert first_failure([logged, KILLED]) is KILLED


def test_the_report_ends_with_the_first_traceback_and_the_others_fates():
    ended = replace(FINE, rank=3, exit=Exit(None, 15), was_told=True)
    report = failure_report([FINE, KILLED, PEER_ERROR, ended], PEER_ERROR)
    assert report.splitlines() == [
        "---- deepy: of 4 ranks this one failed first:",
        "---- rank 2: exit code 1, after 10.3 s (process 102)",
        "Traceback",
        "ConnectionError",
        "---- then rank 1: killed by SIGKILL (not by the launcher; often by the kernel when memory "
        "runs out, see dmesg); rank 3: ended by the launcher",
        "---- the job ends with status 1",
    ]


def test_thousands_of_failing_ranks_are_summed_up():
    ends = [replace(PEER_ERROR, rank=rank, ended_at=20.0 + rank) for rank in range(1000)]
    assert "rank 8: exit code 1; and 991 more\n" in failure_report(ends, ends[0])


exits = st.one_of(
    st.builds(Exit, st.integers(0, 255)), st.builds(Exit, st.none(), st.integers(1, 64))
)
ends = st.builds(
    RankEnd,
    rank=st.integers(0, 7),
    pid=st.just(1),
    exit=exits,
    ended_at=st.floats(0, 100),
    trace_began_at=st.none() | st.floats(0, 100),
    was_told=st.booleans(),
    excerpt=st.just(""),
)


@given(st.lists(ends, min_size=1))
def test_the_status_is_0_exactly_if_nobody_failed(ends):
    first = first_failure(ends)
    assert (first is None) == all(end.exit.code == 0 for end in ends)
    assert first is None or 0 < first.status < 256
