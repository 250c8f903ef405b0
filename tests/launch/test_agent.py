"""Ranks live and die together; every test starts real processes."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.launch.launches import launch, run, wait_for

SLEEP = "time.sleep(60)\n"
# A child in the rank's session but in a process group of its own, as shells make them.
GRANDCHILD = """
import subprocess
subprocess.Popen(["sleep", "60"], process_group=0)
"""
READY = "open(f'ready{rank}', 'w').close()\n"


def ready(tmp_path: Path, num_ranks: int) -> bool:
    return all((tmp_path / f"ready{rank}").exists() for rank in range(num_ranks))


def test_each_rank_knows_its_place_and_gets_its_arguments(tmp_path):
    script = """
    import json
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_SIZE CROSS_RANK CROSS_SIZE MASTER_ADDR MASTER_PORT"
    place = {name: os.environ[name] for name in names.split()}
    open(f"{rank}.json", "w").write(json.dumps([sys.argv[1:], place, os.getsid(0) == os.getpid()]))
    """
    assert run(script, 2, tmp_path).status == 0
    for rank in ("0", "1"):
        arguments, place, leads_session = json.loads((tmp_path / f"{rank}.json").read_text())
        assert arguments == [f"--local_rank={rank}"]
        assert leads_session
        assert place == {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_SIZE": "2",
            "CROSS_RANK": "0",
            "CROSS_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
        }


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        ("sys.exit(7)", 7, "rank 1: exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "rank 1: killed by SIGKILL (not by the"),
        ("os.abort()", 134, "rank 1: killed by SIGABRT"),
        ("raise ValueError('boom')", 1, "rank 1: exit code 1"),
    ],
)
def test_the_job_ends_with_the_failing_ranks_status(tmp_path, end, status, words):
    finished = run(f"if rank == 1: {end}\n{SLEEP}", 2, tmp_path)
    assert finished.status == status
    assert words in finished.stderr
    assert "then rank 0: ended by the launcher" in finished.stderr
    assert f"---- the job ends with status {status}" in finished.stderr.splitlines()
    assert finished.seconds < 8


def test_a_rank_that_leaves_with_0_early_does_not_end_the_others(tmp_path):
    finished = run("if rank == 0: time.sleep(0.5); print('still here')", 2, tmp_path)
    assert finished.status == 0
    assert finished.stdout == "still here\n"
    assert finished.stderr == ""


# Rank 1 fails; rank 0 notices a broken connection, and, as its end is quicker, ends first.
PEERS = """
import atexit, socket
path = "peers.sock"
if rank == 0:
    server = socket.socket(socket.AF_UNIX)
    server.bind(path + ".new")
    server.listen()
    os.rename(path + ".new", path)
    peer = server.accept()[0]
    peer.recv(1)
    time.sleep(0.2)  # as long as the launcher may take to read rank 1's traceback
    raise ConnectionError("peer lost")
if rank == 2:
    time.sleep(60)
while not os.path.exists(path):
    time.sleep(0.01)
peer = socket.socket(socket.AF_UNIX)
peer.connect(path)
def end_slowly():
    peer.close()
    time.sleep(0.6)
atexit.register(end_slowly)
try:
    {}["cause"]
except KeyError as error:
    raise ValueError("boom") from error
"""


def test_the_first_failing_ranks_traceback_is_the_first_and_the_last_one(tmp_path):
    finished = run(PEERS, 3, tmp_path)
    assert finished.status == 1
    lines = finished.stderr.splitlines()
    traces = [number for number, line in enumerate(lines) if "Traceback (most" in line]
    assert lines[traces[0]] == "[rank1]: Traceback (most recent call last):"
    report = lines.index(next(line for line in lines if "of 3 ranks this one failed first" in line))
    assert lines[report + 1].startswith("---- rank 1: exit code 1, after ")
    # Both tracebacks of the chain, whole, and nobody else's.
    assert traces[-2:] == [report + 2, traces[-1]]
    assert lines[-3:-1] == [
        "ValueError: boom",
        "---- then rank 0: exit code 1; rank 2: ended by the launcher",
    ]
    assert "ConnectionError: peer lost" in lines[:report]


def test_a_rank_deaf_to_sigterm_is_killed_after_the_grace_time(tmp_path):
    script = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY
    script += "if rank == 0: time.sleep(60)\n"
    script += "while not os.path.exists('ready0'): time.sleep(0.01)\nsys.exit(3)"
    finished = run(script, 2, tmp_path)
    assert finished.status == 3
    assert 1.1 < finished.seconds < 5  # 0.8 s to settle, 0.4 s of grace


@pytest.mark.parametrize("end", ["sys.exit(3)", "sys.exit(0)"])
def test_what_ranks_started_ends_with_the_job(tmp_path, end):
    finished = run(GRANDCHILD + end, 2, tmp_path)  # run() requires that nothing is left
    assert finished.status == (3 if "3" in end else 0)
    if finished.status == 0:
        assert "deepy: ended 2 processes that ranks had left behind" in finished.stderr


@pytest.mark.parametrize("target", ["launcher", "its process group", "launcher and guard"])
def test_sigkill_of_the_launcher_leaves_nothing_behind(tmp_path, target):
    script = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    # Without a guard nothing can find grandchildren, but ranks die with the launcher all the same.
    script += (GRANDCHILD if target != "launcher and guard" else "") + READY + SLEEP
    with launch(script, 2, tmp_path) as running:
        wait_for(lambda: ready(tmp_path, 2))
        killed_at = time.monotonic()
        if target == "launcher and guard":
            os.kill(running.guard(), signal.SIGKILL)
        if target == "its process group":
            os.killpg(running.process.pid, signal.SIGKILL)
        else:
            running.process.kill()
        wait_for(lambda: not running.marked(), timeout_s=2.0)
        assert time.monotonic() - killed_at < 2.0
        finished = running.finish()
        assert finished.status == -signal.SIGKILL
        assert ("its ranks were ended too" in finished.stderr) == (target != "launcher and guard")


def test_training_goes_on_without_its_guard(tmp_path):
    script = READY + "while not os.path.exists('go'): time.sleep(0.01)"
    with launch(script, 1, tmp_path) as running:
        wait_for(lambda: ready(tmp_path, 1))
        os.kill(running.guard(), signal.SIGKILL)
        (tmp_path / "go").touch()
        assert running.finish().status == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_signals_are_passed_on_once_and_the_ranks_decide(tmp_path, name):
    script = f"""
    def leave(number, frame):
        print(rank, signal.Signals(number).name)
        time.sleep(0.2)  # a second one would interrupt
        sys.exit(0)
    signal.signal(signal.{name}, leave)
    {READY}
    time.sleep(60)
    """
    with launch(script, 2, tmp_path) as running:
        wait_for(lambda: ready(tmp_path, 2))
        running.process.send_signal(getattr(signal, name))
        finished = running.finish()
    assert finished.status == 0
    assert sorted(finished.stdout.splitlines()) == [f"0 {name}", f"[rank1]: 1 {name}"]


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_job_stopped_by_a_signal_says_so_without_a_failure_report(tmp_path, name, status):
    with launch(READY + SLEEP, 2, tmp_path) as running:
        wait_for(lambda: ready(tmp_path, 2))
        running.process.send_signal(getattr(signal, name))
        finished = running.finish()
    assert finished.status == status
    assert f"deepy: stopped by {name} after" in finished.stderr.splitlines()[-1]
    assert "failed first" not in finished.stderr


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_stop_signal_kills_at_once(tmp_path, first):
    script = """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: open(f"told{rank}", "w").close())
    """
    script += "    " + READY + "    while True: time.sleep(60)"
    with launch(script, 2, tmp_path) as running:
        wait_for(lambda: ready(tmp_path, 2))
        running.process.send_signal(first)
        wait_for(lambda: (tmp_path / "told0").exists() and (tmp_path / "told1").exists())
        time.sleep(2.1)  # sooner it would be the same wish once more
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGTERM)
        finished = running.finish()
    assert finished.status == 128 + first
    assert finished.seconds < 1
    assert "asked to stop a second time; killing the ranks" in finished.stderr


def test_a_hangup_ignored_by_nohup_stays_ignored(tmp_path):
    script = READY + "while not os.path.exists('go'): time.sleep(0.01)\nprint('done')"
    (tmp_path / "nohup.sh").write_text('trap "" HUP; exec "$@"')
    with launch(script, 1, tmp_path) as plain:
        command = ["sh", "nohup.sh", *plain.process.args]
        (tmp_path / "go").touch()
        plain.finish()
    (tmp_path / "go").unlink()
    (tmp_path / "ready0").unlink()
    with launch(script, 1, tmp_path, command=command) as running:
        wait_for(lambda: ready(tmp_path, 1))
        running.process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        (tmp_path / "go").touch()
        finished = running.finish()
    assert (finished.status, finished.stdout) == (0, "done\n")


def test_the_launcher_sleeps_while_its_ranks_work(tmp_path):
    def switches(process: int) -> int:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

    with launch(READY + SLEEP, 2, tmp_path) as running:
        wait_for(lambda: ready(tmp_path, 2))
        time.sleep(0.2)
        processes = (running.process.pid, running.guard())
        before = [switches(process) for process in processes]
        time.sleep(0.5)
        after = [switches(process) for process in processes]
        assert after[0] <= before[0] + 2  # the watchdog's look, once a second
        assert after[1] == before[1]


def test_nothing_a_rank_writes_is_lost_or_torn(tmp_path):
    script = """
    for number in range(20000):
        print(f"{rank}:{number}:" + "x" * 30, file=sys.stderr if number % 2 else sys.stdout)
    sys.stderr.write(f"{rank}:unfinished")
    """
    finished = run(script, 3, tmp_path)
    for stream, parity in ((finished.stdout, 0), (finished.stderr, 1)):
        for rank, prefix in ((0, ""), (1, "[rank1]: "), (2, "[rank2]: ")):
            start = f"{prefix}{rank}:"
            mine = [line for line in stream.splitlines() if line.startswith(start)]
            expected = [f"{start}{number}:" + "x" * 30 for number in range(parity, 20000, 2)]
            assert mine == expected + ([f"{start}unfinished"] if parity else [])


def test_prompts_of_rank_0_appear_though_their_line_has_no_end(tmp_path):
    script = """
    os.write(2, b"prompt> ")
    os.write(1, b"half a line")
    while not os.path.exists('go'): time.sleep(0.01)
    os.write(1, b", and the rest\\n")
    """
    with launch(script, 1, tmp_path) as running:
        assert os.read(running.process.stderr.fileno(), 100) == b"prompt> "
        assert os.read(running.process.stdout.fileno(), 100) == b"half a line"
        (tmp_path / "go").touch()
        finished = running.finish()
    assert (finished.stdout, finished.stderr) == (", and the rest\n", "\n")


def test_on_a_terminal_rank_0_writes_to_the_terminal_itself(tmp_path):
    ours, terminal = os.openpty()
    with launch("print(os.isatty(1), rank)", 2, tmp_path, stdout=terminal) as running:
        assert running.finish().status == 0
    os.close(terminal)
    lines = sorted(os.read(ours, 1000).decode().splitlines())
    os.close(ours)
    assert lines == ["True 0", "[rank1]: False 1"]


def test_training_goes_on_when_nobody_reads_the_output_any_more(tmp_path):
    script = (
        READY
        + """
while not os.path.exists("go"): time.sleep(0.01)
sys.stderr.write("lost\\n" * 1000)
open(f"done{rank}", "w").close()
"""
    )
    with launch(script, 2, tmp_path) as running:
        wait_for(lambda: ready(tmp_path, 2))
        running.process.stderr.close()
        (tmp_path / "go").touch()
        assert running.process.wait(10) == 0
    assert (tmp_path / "done0").exists()
    assert (tmp_path / "done1").exists()
