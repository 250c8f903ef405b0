"""Jobs on several nodes; every node is this machine, with a real agent and real ranks."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron.base.exit_codes import CANNOT_LAUNCH, NODE_LOST, STOPPED
from tests.launch.launches import Finished, Launch, launch, wait_for

SLEEP = "time.sleep(60)\n"
READY = "open(f'ready{rank}', 'w').close()\n"
pytestmark = pytest.mark.launcher

HOSTS = ("one:1", "two:2")


def start(script, tmp_path, *, hosts=HOSTS, **environ):
    command = [sys.executable, "-m", "tests.launch.run_job", *hosts, "user_script.py"]
    return launch(script, 0, tmp_path, command=command, DS_ACCELERATOR="cpu", **environ)


def run(script, tmp_path, **options) -> Finished:
    with start(script, tmp_path, **options) as running:
        finished = running.finish()
        assert running.marked() == []
        return finished


def wait_until_ready(tmp_path: Path, num_ranks: int = 3) -> None:
    wait_for(lambda: len(list(tmp_path.glob("ready*"))) == num_ranks, timeout_s=30.0)


def agents(running: Launch) -> dict[str, int]:
    """Return the process id of the agent of every node."""
    found = {}
    for process in running.marked():
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
        if "megatron.cli.node_agent" in words:
            found[words[words.index("--node") + 1]] = process
    return found


def test_ranks_count_through_the_nodes_and_get_the_launchers_settings(tmp_path):
    script = """
    import json
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_SIZE CROSS_RANK CROSS_SIZE MASTER_ADDR MASTER_PORT"
    names += " GLOO_SOCKET_IFNAME WANDB_API_KEY NEOX_JOB_TOKEN"
    place = {name: os.environ.get(name) for name in names.split()}
    open(f"{rank}.json", "w").write(json.dumps([sys.argv[1:], place]))
    """
    secret = {"GLOO_SOCKET_IFNAME": "lo", "WANDB_API_KEY": "0123456789"}
    assert run(script, tmp_path, hosts=("one:1", "two:2"), **secret).status == 0
    ports = set()
    for rank, (node, local, size) in enumerate([(0, 0, 1), (1, 0, 2), (1, 1, 2)]):
        arguments, place = json.loads((tmp_path / f"{rank}.json").read_text())
        assert arguments == [f"--local_rank={local}", "argument"]
        ports.add(place.pop("MASTER_PORT"))
        assert place == secret | {
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": "3",
            "LOCAL_SIZE": str(size),
            "CROSS_RANK": str(node),
            "CROSS_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "NEOX_JOB_TOKEN": None,
        }
    assert len(ports) == 1


def test_no_secret_stands_in_a_command_line_or_stays_in_a_file(tmp_path):
    with start(READY + SLEEP, tmp_path, WANDB_API_KEY="0123456789") as running:
        wait_until_ready(tmp_path)
        assert list(tmp_path.glob(".neox-job-*")) == []
        for process in running.marked():
            assert b"0123456789" not in Path(f"/proc/{process}/cmdline").read_bytes()


def test_one_failing_rank_ends_all_nodes_and_its_traceback_is_the_last_word(tmp_path):
    script = f"{READY}if rank == 2: raise ValueError('boom')\n{SLEEP}"
    finished = run(script, tmp_path)
    assert finished.status == 1
    assert "deepy: rank 2 on two: exit code 1; ending all nodes\n" in finished.stderr
    assert re.search(
        r"of 3 ranks this one failed first:\n---- rank 2 on two: exit code 1, after .*\n"
        r"Traceback \(most recent call last\):\n(  .*\n)+ValueError: boom\n"
        r"---- then rank 0 on one: ended by the launcher; rank 1 on two: ended by the launcher\n"
        r"---- the job ends with status 1\n$",
        finished.stderr,
    )
    assert finished.seconds < 15


def test_the_earlier_failure_is_told_though_the_other_node_fails_too(tmp_path):
    script = """
    if rank == 2: raise ValueError("boom")
    while not os.path.exists("failed"): time.sleep(0.01)
    raise ConnectionError("connection closed by peer")
    """
    finished = run(script.replace("raise V", "open('failed', 'w').close(); raise V"), tmp_path)
    assert finished.status == 1
    assert "---- rank 2 on two: exit code 1" in finished.stderr
    assert "ConnectionError" not in finished.stderr.partition("failed first")[2]


def test_a_node_whose_agent_dies_is_lost_and_the_others_end(tmp_path):
    with start(READY + SLEEP, tmp_path) as running:
        wait_until_ready(tmp_path)
        os.kill(agents(running)["two"], signal.SIGKILL)
        finished = running.finish()
        wait_for(lambda: running.marked() == [])
    assert finished.status == NODE_LOST
    assert "deepy: lost two: the connection to its agent has ended; ending" in finished.stderr
    assert finished.stderr.endswith(
        "---- deepy: lost two: the connection to its agent has ended\n"
        f"---- the job ends with status {NODE_LOST}\n"
    )


@pytest.mark.parametrize("target", ["launcher", "its process group"])
def test_sigkill_of_the_launcher_ends_all_nodes(tmp_path, target):
    with start("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + SLEEP, tmp_path) as job:
        wait_until_ready(tmp_path)
        if target == "launcher":
            job.process.kill()
        else:
            os.killpg(job.process.pid, signal.SIGKILL)
        wait_for(lambda: job.marked() == [], timeout_s=10.0)


def test_what_started_the_agents_may_not_go_away(tmp_path):
    with start(READY + SLEEP, tmp_path) as running:
        wait_until_ready(tmp_path)
        for process in running.marked():
            if Path(f"/proc/{process}/comm").read_text() == "sh\n":
                os.kill(process, signal.SIGKILL)
        finished = running.finish()
        wait_for(lambda: running.marked() == [])
    assert finished.status == NODE_LOST
    assert "lost one, two: sh ended (killed by SIGKILL)" in finished.stderr


@pytest.mark.parametrize("target", ["launcher", "one agent"])
def test_a_signal_reaches_every_rank_once_wherever_it_arrives(tmp_path, target):
    script = f"""
    def leave(number, frame):
        print(rank, signal.Signals(number).name)
        time.sleep(0.2)  # a second one would interrupt
        sys.exit({STOPPED})
    signal.signal(signal.SIGUSR1, leave)
    {READY}
    time.sleep(60)
    """
    with start(script, tmp_path) as running:
        wait_until_ready(tmp_path)
        if target == "launcher":
            running.process.send_signal(signal.SIGUSR1)
        else:
            os.kill(agents(running)["two"], signal.SIGUSR1)
        finished = running.finish()
    assert finished.status == STOPPED
    assert sorted(finished.stdout.splitlines()) == [
        "0 SIGUSR1",
        "[rank1]: 1 SIGUSR1",
        "[rank2]: 2 SIGUSR1",
    ]
    assert finished.stderr.endswith(
        "deepy: stopped on purpose (SIGUSR1); the same command goes on from the last save\n"
    )


def test_ctrl_c_twice_kills_ranks_that_go_on(tmp_path):
    script = f"signal.signal(signal.SIGINT, signal.SIG_IGN)\n{READY}{SLEEP}"
    with start(script, tmp_path) as running:
        wait_until_ready(tmp_path)
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        running.process.send_signal(signal.SIGINT)
        finished = running.finish()
        assert running.marked() == []
    assert finished.status == 130
    assert finished.stderr.endswith(" s\n")
    assert "deepy: stopped by SIGINT after" in finished.stderr


def test_nodes_that_do_not_come_are_named(tmp_path):
    only_one = "test {node} = two || exec " + sys.executable
    only_one += " -m megatron.cli.node_agent --head {head} --job-file {file} --node {node}"
    finished = run(READY, tmp_path, AGENTS=f"({only_one})", DEEPY_CONNECT_S="3")
    assert finished.status == NODE_LOST
    assert "deepy: 1 of 2 nodes can't take part: two: no agent came within 3 s" in finished.stderr
    assert list(tmp_path.glob("ready*")) == []


def test_what_started_the_agents_has_ended_and_nobody_came(tmp_path):
    finished = run(READY, tmp_path, AGENTS="true")
    assert finished.status == NODE_LOST
    assert "one, two: no agent came, and sh has ended (exit code 0)" in finished.stderr


def test_another_version_on_a_node_is_refused_before_a_rank_starts(tmp_path):
    # Another deepspeed, for the agent of one node only.
    other = tmp_path / "other/deepspeed-0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.1\n")
    line = "test {node} = two && PYTHONPATH=other:$PYTHONPATH; " + sys.executable
    line += " -m megatron.cli.node_agent --head {head} --job-file {file} --node {node}"
    finished = run(READY, tmp_path, AGENTS=f"({line})")
    assert finished.status == CANNOT_LAUNCH
    assert re.search(
        r"deepy: two: other software than on the launcher's machine: deepspeed 0\.1 instead of \d",
        finished.stderr,
    )
    assert list(tmp_path.glob("ready*")) == []


def test_agents_without_the_token_are_sent_away(tmp_path):
    line = "NEOX_JOB_TOKEN=guessed " + sys.executable
    line += " -m megatron.cli.node_agent --head {head} --node {node}"
    finished = run(READY, tmp_path, AGENTS=line)
    assert finished.status == NODE_LOST
    assert "one: the connection to the launcher has ended" in finished.stderr
