"""A rank over its time is noticed, and the one that holds up the others is named first."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from megatron.base.progress import PROGRESS_VARIABLE, Progress
from megatron.engine.launch.watchdog import RankProgress, Watchdog, hang_report
from tests.launch.launches import wait_for


@dataclass
class Node:
    """Ranks 4 and 5 of a job, with a clock of their own."""

    monkeypatch: pytest.MonkeyPatch
    now: float = 1000.0
    processes: dict[int, int] = field(default_factory=lambda: {4: os.getpid(), 5: os.getpid()})

    def __post_init__(self) -> None:
        self.monkeypatch.setattr("megatron.base.progress.time.monotonic", lambda: self.now)
        self.watchdog = Watchdog(4, 2, clock=lambda: self.now)
        self.ranks = [
            Progress.at(self.watchdog.variables(local)[PROGRESS_VARIABLE]) for local in (0, 1)
        ]

    def look_for(self, seconds: int) -> str | None:
        """Look each second; return the first alarm."""
        for _ in range(seconds):
            self.now += 1.0
            if (alarm := self.watchdog.look(self.processes)) is not None:
                return alarm
        return None


@pytest.fixture
def node(monkeypatch) -> Iterator[Node]:
    node = Node(monkeypatch)
    with node.watchdog:
        yield node


def test_ranks_that_say_nothing_are_left_alone(node):
    assert node.look_for(100_000) is None


def test_a_rank_over_its_time_is_told_at_the_second_look(node):
    node.ranks[0].enter("step", 11, 60.0)
    node.ranks[1].enter("step", 12, 60.0)
    assert node.look_for(61) is None
    assert node.look_for(1) == "rank 4: step 11 for 62 s, limit 60 s"


def test_a_rank_that_goes_on_after_the_first_look_is_left_alone(node):
    node.ranks[0].enter("step", 11, 60.0)
    assert node.look_for(61) is None
    node.ranks[0].step(12, 60.0)
    assert node.look_for(60) is None


def test_a_rank_that_has_ended_is_left_alone(node):
    node.ranks[0].enter("step", 11, 60.0)
    del node.processes[4]
    assert node.look_for(100) is None


def test_time_in_which_nobody_looked_does_not_count(node):
    node.ranks[0].enter("step", 11, 60.0)
    assert node.look_for(50) is None
    node.now += 3600.0  # the whole job was stopped
    assert node.look_for(12) is None  # 10 s are left of 60
    assert node.look_for(1) == "rank 4: step 11 for 62 s, limit 60 s"


def test_time_in_which_nobody_looked_counts_for_what_began_later(node):
    assert node.look_for(1) is None
    node.now += 3600.0
    assert node.look_for(1) is None
    node.ranks[0].enter("step", 11, 60.0)
    assert node.look_for(61) is None
    assert node.look_for(1) is not None


def told(*ranks: RankProgress) -> list[int]:
    """Return the ranks in the order of a report."""
    lines = hang_report(ranks).splitlines()
    return [int(line.split()[2]) for line in lines if line.startswith("---- rank")]


def rank(number: int, phase: str, step: int | None, for_s: float, **more: object) -> RankProgress:
    values = {"node": "n", "pid": 1, "limit_s": 60.0, "state": "runs", **more}
    return RankProgress(rank=number, phase=phase, step=step, for_s=for_s, **values)


@pytest.mark.parametrize(
    ("culprit", "peer"),
    [
        # stopped, whatever else is seen
        (rank(1, "step", 12, 61.0, state="is stopped"), rank(0, "step", 11, 99.0)),
        (rank(1, "failing", 12, 61.0), rank(0, "step", 12, 99.0)),
        # behind: its reports, or what it saves, keep it from the next step
        (rank(1, "step", 11, 61.5), rank(0, "step", 12, 61.0)),
        (rank(1, "save", 11, 61.5), rank(0, "step", 12, 61.0)),
        (rank(1, "step", 12, 61.0), rank(0, "save", 12, 61.5)),
        # in the same step, but not waiting for anybody
        (rank(1, "step", 12, 61.0), rank(0, "step", 12, 61.2, is_waiting=True)),
        # before the first step: whoever began earlier hasn't come as far
        (rank(1, "data", None, 90.0), rank(0, "model", None, 61.0)),
        (rank(1, "load", None, 90.0), rank(0, "step", 1, 91.0)),
        (rank(1, "", None, 0.0), rank(0, "step", 1, 91.0)),
    ],
)
def test_the_rank_that_holds_up_the_others_comes_first(culprit, peer):
    assert told(peer, culprit) == told(culprit, peer) == [1, 0]


def test_a_report_of_many_ranks_is_short():
    lines = hang_report([rank(n, "step", 12, 61.0) for n in range(1024)]).splitlines()
    assert len(lines) < 20
    assert lines[-1] == "---- and 1008 more; see their stacks above"


def test_a_report_says_what_a_rank_did_where_and_for_how_long():
    row = rank(
        3, "save", 12, 61.0, node="node2", pid=77, state="waits for a disk", frame="a.py:1 f"
    )
    assert str(row) == (
        "rank 3 (node2, process 77): step 12, save for 61 s, limit 60 s; it waits for a disk; "
        "in a.py:1 f"
    )


DUMP = """\
Thread 0x00007f1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait

Current thread 0x00007f2 (most recent call first):
  File "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 9 in wait
  File "/home/me/train.py", line 3 in <module>
and what somebody wrote afterwards
""".splitlines()


def test_the_main_threads_innermost_frame_tells_whether_a_rank_waits(node):
    node.processes = {}
    node.watchdog.ask_for_stacks({})
    waiting = node.watchdog.progress_of(4, DUMP)
    assert waiting.frame == "torch/distributed/distributed_c10d.py:9 wait"
    assert waiting.is_waiting
    silent = node.watchdog.progress_of(5, [])
    assert (silent.frame, silent.is_waiting, silent.state) == (None, False, "has ended")


def test_progress_is_known_without_a_hang_if_the_rank_has_told_any(node):
    assert node.watchdog.progress_of(4, []) is None
    node.ranks[0].enter("step", 11, 60.0)
    assert node.watchdog.progress_of(4, []).done_step == 10
    node.ranks[0].enter("save", 11, 60.0)
    assert node.watchdog.progress_of(4, []).done_step == 11
    node.ranks[0].enter("load")
    assert node.watchdog.progress_of(4, []).done_step is None


def test_a_rank_that_cannot_tell_its_stacks_yet_is_not_ended_by_asking(node):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        node.watchdog.ask_for_stacks({4: process.pid})
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
    finally:
        process.kill()
        process.wait()


def test_a_stopped_rank_is_seen_to_be_stopped_and_goes_on_to_tell_its_stacks(node):
    script = """
import os, signal, time
from megatron.base.progress import progress_of_this_process
progress_of_this_process().enter("step", 3, 60.0)
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, **node.watchdog.variables(0)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:

        def state() -> str:
            with open(f"/proc/{process.pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0]

        wait_for(lambda: state() == "T")
        node.watchdog.ask_for_stacks({4: process.pid})
        lines = [process.stderr.readline().rstrip("\n") for _ in range(2)]
        process.send_signal(signal.SIGKILL)
        lines += process.stderr.read().splitlines()
        found = node.watchdog.progress_of(4, lines)
        assert (found.state, found.step, found.frame) == ("is stopped", 3, "<string>:5 <module>")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
