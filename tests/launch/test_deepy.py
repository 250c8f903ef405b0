"""The real deepy.py: what it refuses, what it starts, and what is left of it."""

import ast
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.cli.deepy import main
from tests.launch.launches import REPOSITORY, SMALL_CONFIG, deepy, run_deepy, wait_for

pytestmark = pytest.mark.launcher

NOTHING = "open('started', 'w').close()"
READY = "open(f'ready{rank}', 'w').close()\n"


@pytest.mark.parametrize(
    ("config", "hosts", "message"),
    [
        ({"hidden_sise": 8}, None, "small.yml: unknown key 'hidden_sise'; did you mean 'hidden_si"),
        ({"hidden_size": 9, "num_attention_heads": 2}, None, "hidden_size=9"),
        ({}, "localhost slots=1\n", "num_gpus=2 asks for more ranks than slots on localhost (1 sl"),
        ({"num_gpus": None}, "a slots=1\na slots=1\n", "hosts:2: host 'a' is already listed"),
        (
            {"num_gpus": None, "num_nodes": 3},
            "a slots=1\nb slots=1\n",
            "num_nodes=3, but there are",
        ),
        ({"include": "b"}, "a slots=4\n", "include 'b': host 'b' is not among a (4 slots)"),
        ({"global_num_gpus": 4}, None, "for 4 ranks (global_num_gpus), but this machine gives 2"),
        ({"pipe_parallel_size": 4, "num_layers": 4}, None, "more than the 2 slots there are"),
        ({"autotuning_run": "tune"}, None, "known to NeoX, not supported here yet: autotuning_run"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    tmp_path, monkeypatch, capsys, config, hosts, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLTS_HOSTFILE", "none")
    (tmp_path / "user_script.py").write_text(NOTHING)
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
        config = {"hostfile": "hosts", **config}
    (tmp_path / "small.yml").write_text(json.dumps(SMALL_CONFIG | config))
    assert main(["user_script.py", "small.yml"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "started").exists()


def test_a_taken_port_and_a_missing_script_are_refused_too(tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        finished = run_deepy(NOTHING, {"master_port": port}, tmp_path)
    assert (finished.status, (tmp_path / "started").exists()) == (2, False)
    assert f"deepy: master_port {port} is taken on this machine" in finished.stderr
    answer = subprocess.run(
        [sys.executable, str(REPOSITORY / "deepy.py"), "nowhere.py", "small.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("deepy: user script 'nowhere.py' not found in ")


def test_every_rank_gets_the_configuration_and_it_is_printed_once(tmp_path):
    script = """
    from megatron.config.transport import load_transported
    config = load_transported()
    print("rank", rank, config.model.hidden_size, config.topology.world_size)
    """
    finished = run_deepy(script, {}, tmp_path)
    assert finished.status == 0
    lines = finished.stdout.splitlines()
    assert sorted(line for line in lines if "rank " in line) == [
        "[rank1]: rank 1 8 2",
        "rank 0 8 2",
    ]
    assert sum(line.startswith("  hidden_size ...") for line in lines) == 1
    assert next(line for line in lines if "hidden_size" in line).endswith(" 8  (small.yml)")


def test_a_configuration_too_long_for_an_argument_travels_by_file(tmp_path):
    script = """
    from megatron.config.transport import load_transported
    print(len(load_transported().training.train_data_paths))
    assert len(os.sys.argv) == 6 and len(os.sys.argv[5]) < 1000
    """
    paths = [f"a/rather/long/path/to/a/data/set/number/{number:08}" for number in range(4000)]
    many = {
        "data_path": None,
        "train_data_paths": paths,
        "valid_data_paths": paths[:1],
        "test_data_paths": paths[:1],
    }
    finished = run_deepy(script, many, tmp_path, TMPDIR=str(tmp_path))
    assert finished.status == 0
    assert sorted(finished.stdout.splitlines()[-2:]) == ["4000", "[rank1]: 4000"]
    assert list(tmp_path.glob("megatron-config-*")) == []  # deleted after the run


def test_a_failing_rank_fails_deepy_with_its_traceback(tmp_path):
    script = f"if rank == 1: raise ValueError('boom')\n{READY}time.sleep(60)"
    finished = run_deepy(script, {}, tmp_path, DEEPY_GRACE_S="0.2")
    assert finished.status == 1
    assert re.search(
        r"failed first:\n---- rank 1: exit code 1.*\nTraceback \(most recent call last\):\n"
        r"(  .*\n)+ValueError: boom\n---- then rank 0: ended by the launcher\n"
        r"---- the job ends with status 1\n$",
        finished.stderr,
    )


def test_sigkill_of_deepy_leaves_no_rank_behind(tmp_path):
    script = f"import subprocess; subprocess.Popen(['sleep', '60'])\n{READY}time.sleep(60)"
    with deepy(script, {}, tmp_path) as running:
        wait_for(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
        assert len(running.marked()) == 6  # deepy.py, its guard, two ranks, two children
        running.process.kill()
        wait_for(lambda: not running.marked(), timeout_s=2.0)


def test_sigterm_reaches_the_ranks_and_their_status_comes_back(tmp_path):
    script = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(40 + rank))\n{READY}"
    with deepy(script + "time.sleep(60)", {"num_gpus": 1}, tmp_path) as running:
        wait_for(lambda: (tmp_path / "ready0").exists())
        running.process.terminate()
        finished = running.finish()
    assert finished.status == 40
    assert "deepy: SIGTERM passed on to the ranks" in finished.stderr


def test_two_jobs_at_once_rendezvous_at_different_ports(tmp_path):
    script = f"open('port', 'w').write(os.environ['MASTER_PORT'])\n{READY}time.sleep(60)"
    ports = set()
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with deepy(script, {}, folders[0]), deepy(script, {}, folders[1]):
        for folder in folders:
            wait_for((folder / "ready0").exists)
            ports.add((folder / "port").read_text())
    assert len(ports) == 2


def test_the_port_can_come_from_the_environment_and_the_key_wins(tmp_path):
    with socket.socket() as free, socket.socket() as other:
        free.bind(("", 0))
        other.bind(("", 0))
        exported, configured = free.getsockname()[1], other.getsockname()[1]
    script = "print('port', os.environ['MASTER_PORT'])"
    one = {"num_gpus": 1}
    finished = run_deepy(script, one, tmp_path, MASTER_PORT=str(exported))
    assert f"port {exported}\n" in finished.stdout
    one["master_port"] = configured
    finished = run_deepy(script, one, tmp_path, MASTER_PORT=str(exported))
    assert f"port {configured}\n" in finished.stdout


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MASTER_PORT", "http", "deepy: $MASTER_PORT='http' is not a port (1 to 65535)"),
        ("DEEPY_GRACE_S", "-1", "deepy: $DEEPY_GRACE_S='-1' is not a number of seconds"),
    ],
)
def test_a_bad_setting_in_the_environment_is_named(
    tmp_path, monkeypatch, capsys, name, value, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLTS_HOSTFILE", "none")
    monkeypatch.setenv(name, value)
    (tmp_path / "user_script.py").write_text(NOTHING)
    (tmp_path / "small.yml").write_text(json.dumps(SMALL_CONFIG))
    assert main(["user_script.py", "small.yml"]) == 2
    assert message in capsys.readouterr().err


def test_secrets_travel_in_the_environment_not_in_arguments(tmp_path):
    secret = "0123456789abcdef"
    script = f"open(f'key{{rank}}', 'w').write(os.environ['WANDB_API_KEY'])\n{READY}time.sleep(60)"
    with deepy(script, {}, tmp_path, WANDB_API_KEY=secret) as running:
        wait_for(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
        for process in running.marked():
            assert secret.encode() not in Path(f"/proc/{process}/cmdline").read_bytes()
        assert [(tmp_path / f"key{rank}").read_text() for rank in (0, 1)] == [secret, secret]


def test_options_follow_or_precede_the_positionals(tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=3\n")
    script = "print('world', os.environ['WORLD_SIZE'])"
    finished = run_deepy(script, {"num_gpus": None}, tmp_path, "--hostfile", "hosts")
    assert "\nworld 3\n" in finished.stdout
    (tmp_path / "hosts").write_text("node7 slots=1\n")
    finished = run_deepy(script, {"num_gpus": None, "hostfile": "gone"}, tmp_path, "-H", "hosts")
    assert "\nworld 1\n" in finished.stdout
    assert "note: the only host, node7, is taken to be this machine" in finished.stderr
    finished = run_deepy(script, {"hostfile": "gone"}, tmp_path)
    assert "note: there is no hostfile gone; launching on this machine alone" in finished.stderr


def test_a_launch_imports_neither_torch_nor_numpy():
    printed = subprocess.run(
        [sys.executable, "-c", "import sys, megatron.cli.deepy; print(sorted(sys.modules))"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    loaded = {name.partition(".")[0] for name in ast.literal_eval(printed)}
    assert not loaded & {"torch", "deepspeed", "numpy"}


def test_help_tells_how_to_call_it():
    answer = subprocess.run(
        [str(REPOSITORY / "deepy.py"), "--help"],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.startswith("usage: deepy.py ")
    assert "user_script" in answer.stdout


def test_a_launcher_that_is_not_installed_is_an_error_without_traceback(tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    config = {"hostfile": "hosts", "num_gpus": None, "master_addr": "a", "no_ssh_check": True}
    finished = run_deepy(NOTHING, config, tmp_path, PATH="/nowhere")
    assert finished.status == 2
    assert "deepy: launcher 'pdsh' needs pdsh, which is not installed here" in finished.stderr
    assert "Traceback" not in finished.stderr
