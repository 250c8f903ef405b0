"""Which signals are one wish to stop, and which mean that there is no time to save."""

from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2

import pytest

from megatron.engine.launch import wishes
from megatron.engine.launch.wishes import Wishes


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(wishes.time, "monotonic", lambda: now[0])
    return now


def later(clock, seconds=3.0):
    clock[0] += seconds


@pytest.mark.parametrize("again", [SIGINT, SIGTERM, SIGUSR1, SIGHUP])
def test_the_same_wish_may_come_by_several_ways(clock, again):
    told = Wishes()
    assert told.add(SIGTERM)
    later(clock, 1.9)
    assert not told.add(again)
    assert not told.is_second


def test_a_user_at_a_terminal_is_heard_at_once(clock):
    told = Wishes()
    assert told.add(SIGINT, is_urgent=True)
    assert told.add(SIGINT, is_urgent=True)
    assert told.is_second


@pytest.mark.parametrize(
    ("first", "second", "hurries"),
    [
        (SIGTERM, SIGTERM, True),
        (SIGTERM, SIGINT, True),
        (SIGINT, SIGTERM, True),
        (SIGUSR1, SIGUSR1, True),
        (SIGUSR1, SIGINT, True),
        # the time between is for saving
        (SIGUSR1, SIGTERM, False),
        (SIGUSR2, SIGTERM, False),
        (SIGTERM, SIGUSR1, False),
        (SIGTERM, SIGHUP, False),
    ],
)
def test_who_asks_again_wants_it_to_end_now(clock, first, second, hurries):
    told = Wishes()
    told.add(first)
    later(clock)
    assert told.add(second) == hurries
    assert told.is_second == hurries


def test_slurm_sends_sigterm_twice_and_sigkill_later(clock):
    told = Wishes(under_slurm=True)
    told.add(SIGTERM)
    later(clock)
    assert not told.add(SIGTERM)
    later(clock)
    assert told.add(SIGINT)
