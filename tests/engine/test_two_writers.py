"""Two training runs that want one save directory: real processes, paused and killed."""

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from megatron.base import write_points
from megatron.base.file_digests import digest_file
from megatron.ledger.lease import Lease
from tests.engine.killed_runs import KilledRun, hidden_names, lineage, loaded_step, newest_committed
from tests.worlds import WorldFailed

pytestmark = pytest.mark.distributed

PAUSES = ["commit: manifest written", "latest prepared"]
PATIENCE_S = 60


class Writer:
    """A run of one rank that comes to a halt at a write point of its second save.

    Args:
        run: whose directory it writes to.
        point: where it halts.
        is_paused: by SIGSTOP; otherwise it only takes its time there, alive.
    """

    def __init__(self, run: KilledRun, point: str, *, is_paused: bool) -> None:
        self._error = run.folder / "error"
        self._halted = run.folder / "halted"
        self._process = multiprocessing.get_context("fork").Process(
            target=self._launch, args=(run, point, is_paused)
        )
        self._process.start()
        self._rank = self._await_halt("T" if is_paused else "S")
        run._launches += 1  # the other process counted its own

    def _launch(self, run: KilledRun, point: str, is_paused: bool) -> None:
        def halt() -> None:
            self._halted.write_text(str(os.getpid()))
            if is_paused:
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(0.5)  # this thread may be the last of the process to stop
            else:
                time.sleep(PATIENCE_S)

        def watch(context) -> None:
            left = 2

            def at_point(name: str) -> None:
                nonlocal left
                left -= name == point
                if name == point and left == 0:
                    halt()

            write_points.install(at_point)

        try:
            run.launch_watched(watch)
        except WorldFailed as failed:
            self._error.write_text(str(failed))

    def _await_halt(self, state: str) -> int:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self._halted.exists() and (pid := self._halted.read_text()):
                stat = Path(f"/proc/{pid}/stat").read_text()
                if stat.rpartition(") ")[2].startswith(state):
                    return int(pid)
            time.sleep(0.01)
        raise AssertionError("the writer never came to its point")

    def wake(self) -> str:
        """Let it go on; return the error it ends with."""
        os.kill(self._rank, signal.SIGCONT)
        self._process.join(PATIENCE_S)
        return self._error.read_text() if self._error.exists() else ""

    def kill(self) -> None:
        """End it, if it hasn't ended."""
        if self._process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._rank, signal.SIGKILL)
        self._process.join(PATIENCE_S)


def with_timeout(seconds: float):
    """Return what makes a rank believe that leases last so long."""

    def watch(context) -> None:
        Lease.acquire.__func__.__kwdefaults__["timeout_s"] = seconds

    return watch


def content(save: Path) -> dict[str, str]:
    """Return the digest of every file that isn't an attempt's own."""
    return {
        str(path.relative_to(save)): digest_file(path)
        for path in save.rglob("*")
        if path.is_file() and "attempts" not in path.parts
    }


@pytest.fixture
def run(tmp_path) -> KilledRun:
    return KilledRun(tmp_path / "run", train_iters=6, lr_decay_iters=6)


@pytest.fixture
def write():
    """Start a :class:`Writer`; it never outlives the test."""
    writers = []

    def begin(*arguments, **options) -> Writer:
        writers.append(Writer(*arguments, **options))
        return writers[-1]

    yield begin
    for writer in writers:
        writer.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = KilledRun(tmp_path_factory.mktemp("undisturbed") / "run", train_iters=6, lr_decay_iters=6)
    run.launch()
    return lineage(run.save)


@pytest.mark.parametrize("point", PAUSES)
def test_a_paused_run_is_taken_over_and_damages_nothing_when_it_wakes(
    run, write, undisturbed, point
):
    paused = write(run, point, is_paused=True)
    assert newest_committed(run.save) == 2
    run.launch_watched(with_timeout(0.5))
    assert loaded_step(run.save) == 2
    assert lineage(run.save) == undisturbed
    before = content(run.save)
    assert "is no longer this job's" in paused.wake()
    assert content(run.save) == before
    assert newest_committed(run.save) == 6
    assert lineage(run.save) == undisturbed
    assert hidden_names(run.save) == []


def test_a_second_run_is_refused_while_the_first_lives_and_goes_on_when_it_is_killed(
    run, write, undisturbed
):
    first = write(run, PAUSES[0], is_paused=False)
    with pytest.raises(WorldFailed, match=r"is in use by process \d+ on .*: two jobs must not"):
        run.launch()
    first.kill()
    run.launch()  # at once: the lease would last 90 seconds
    assert loaded_step(run.save) == 2
    assert lineage(run.save) == undisturbed
    assert hidden_names(run.save) == []
