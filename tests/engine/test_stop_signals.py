"""What signals ask of a process: kept, counted, or obeyed at once."""

import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.base.exit_codes import STOPPED
from megatron.engine.stop_signals import ONE_WISH_S, STOP_SIGNALS, StopSignals

SIGINT, SIGTERM, SIGUSR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


class Left(Exception):  # noqa: N818 - the process would be gone
    """With a status."""


def listening(times: list[float], *, is_slurms: bool = False) -> StopSignals:
    """Return signals that arrive at ``times`` when they are taken."""

    def leave(status: int, told: str) -> None:
        raise Left(status)

    clock = iter(times)
    return StopSignals(leave, lambda: next(clock), is_slurms=is_slurms)


def test_a_signal_before_the_loop_ends_the_process_at_once():
    with pytest.raises(Left, match=str(STOPPED)):
        listening([0.0])._take(SIGTERM)


def test_the_first_one_in_the_loop_is_kept():
    signals = listening([5.0])
    signals.keep()
    signals._take(SIGUSR1)
    assert (signals.wish.name, signals.wish.came_at) == ("SIGUSR1", 5.0)


@given(
    st.lists(st.sampled_from(STOP_SIGNALS), min_size=1),
    st.floats(0, ONE_WISH_S, exclude_max=True),
)
def test_signals_close_together_are_one_wish(numbers, apart):
    signals = listening([apart * place for place in range(len(numbers))])
    signals.keep()
    for number in numbers:
        signals._take(number)
    assert signals.wish.number == numbers[0]


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (SIGTERM, SIGTERM, 143),
        (SIGINT, SIGINT, 130),
        (SIGTERM, SIGINT, 130),
        (SIGUSR1, SIGUSR1, 138),
        (SIGUSR1, SIGINT, 130),
        (SIGTERM, SIGUSR1, 138),
    ],
)
def test_a_second_wish_ends_the_process_with_its_own_status(first, second, status):
    signals = listening([0.0, ONE_WISH_S])
    signals.keep()
    signals._take(first)
    with pytest.raises(Left, match=str(status)):
        signals._take(second)


def test_sigterm_after_its_announcement_leaves_the_time_for_saving():
    signals = listening([0.0, 60.0, 70.0])
    signals.keep()
    signals._take(SIGUSR1)
    signals._take(SIGTERM)
    assert signals.wish.number == SIGUSR1
    with pytest.raises(Left, match="143"):
        signals._take(SIGTERM)


def test_slurm_may_send_sigterm_as_often_as_it_likes_and_sigint_still_leaves():
    signals = listening([0.0, 10.0, 20.0, 30.0], is_slurms=True)
    signals.keep()
    for number in (SIGTERM, SIGTERM, SIGTERM):
        signals._take(number)
    with pytest.raises(Left, match="130"):
        signals._take(SIGINT)


def test_handlers_of_others_are_left_alone_and_defaults_come_back():
    before = signal.signal(SIGTERM, lambda number, frame: None)
    try:
        theirs = signal.getsignal(SIGTERM)
        signals = StopSignals()
        signals.begin()
        signals.keep()
        assert signal.getsignal(SIGTERM) is theirs
        os.kill(os.getpid(), SIGTERM)
        os.kill(os.getpid(), SIGUSR1)
        deadline = time.monotonic() + 10
        while signals.wish is None and time.monotonic() < deadline:
            time.sleep(0.01)
        signals.end()
        assert signals.wish.number == SIGUSR1
        assert signal.getsignal(SIGTERM) is theirs
        assert signal.getsignal(SIGUSR1) is signal.SIG_DFL
        assert signal.getsignal(SIGINT) is signal.default_int_handler
    finally:
        signal.signal(SIGTERM, before)


STUCK = """
import ctypes, os, sys
from megatron.engine.stop_signals import stop_signals

signals = stop_signals()
signals.begin()
signals.keep()
print("ready", flush=True)
mutex = ctypes.create_string_buffer(64)  # Linux: a mutex that nobody holds
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
lock(mutex)  # never comes back; no handler of Python's runs
"""

CHILD = """
import os, time
from megatron.engine.stop_signals import stop_signals

stop_signals().begin()
child = os.fork()
if child == 0:
    time.sleep(60)
time.sleep(0.1)
os.kill(child, 15)
print(os.waitpid(child, 0)[1], stop_signals().wish)
"""


def test_a_second_wish_ends_a_process_whose_main_thread_is_stuck_in_c():
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(SIGTERM)
        time.sleep(ONE_WISH_S + 0.1)
        assert process.poll() is None
        process.send_signal(SIGTERM)
        assert process.wait(10) == 128 + SIGTERM


def test_a_forked_child_is_ended_by_signals_of_its_own_and_its_parent_is_not():
    ended = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("15 None\n", "")
