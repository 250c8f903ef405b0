"""Which command starts the agents, and what travels to them."""

import shlex
import socket
import stat
import sys
from pathlib import Path

import pytest

from megatron.base.errors import LaunchError
from megatron.engine.launch.addresses import is_loopback, own_addresses
from megatron.engine.launch.job_file import JobSecrets, read_job_file, write_job_file
from megatron.engine.launch.remote_start import remote_start
from megatron.engine.launch.software import differences, installed_software
from megatron.engine.launch.travelling import travelling_environment

AGENT = [sys.executable, "-u", "-m", "megatron.cli.node_agent", "--head", "10.0.0.1:7"]


def command_of(launcher, programs, monkeypatch, *, environ=None, launcher_args=()):
    """Return the start of node1 and node2 where only the ``programs`` are installed."""
    monkeypatch.setenv("PATH", str(programs))
    return remote_start(
        launcher,
        ["node1", "node2"],
        ["--head", "10.0.0.1:7"],
        environ=environ or {},
        exported={"NCCL_DEBUG": "INFO", "NEOX_JOB_TOKEN": "secret"},
        launcher_args=launcher_args,
        working_directory="/work dir",
    )


@pytest.fixture
def programs(tmp_path):
    def install(*names):
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        return tmp_path

    return install


def test_pdsh_runs_one_agent_per_host_and_keeps_secrets_out_of_its_command(programs, monkeypatch):
    start = command_of("pdsh", programs("pdsh"), monkeypatch, launcher_args=("-t", "3"))
    *options, script = start.command
    assert options[1:] == ["-S", "-N", "-R", "ssh", "-f", "1024", "-w", "node1,node2", "-t", "3"]
    words = shlex.split(script)
    assert words[:4] == ["cd", "/work dir", "&&", f"PYTHONPATH={Path(__file__).parents[2]}"]
    assert words[4:] == ["exec", *AGENT, "--node", "%h"]
    assert "secret" not in " ".join(start.command)
    assert start.environment["PDSH_RCMD_TYPE"] == "ssh"
    assert "ServerAliveInterval=5" in start.environment["PDSH_SSH_ARGS_APPEND"]
    assert "NEOX_JOB_TOKEN" not in start.environment


def test_srun_starts_one_task_per_node_whatever_the_job_asked_for(programs, monkeypatch):
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_PER_TASK": "1"}
    start = command_of("slurm", programs("srun"), monkeypatch, environ=job)
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=node1,node2"} < set(
        start.command
    )
    assert "--overlap" not in start.command
    assert list(start.command[-len(AGENT) :]) == AGENT
    assert not {"SLURM_NTASKS_PER_NODE", "SLURM_GPUS_PER_TASK"} & set(start.environment)
    assert start.environment["SLURM_JOB_ID"] == "7"
    assert start.environment["NEOX_JOB_TOKEN"] == "secret"
    inside = command_of(
        "slurm", programs("srun"), monkeypatch, environ=job | {"SLURM_STEP_ID": "0"}
    )
    assert "--overlap" in inside.command


@pytest.mark.parametrize(
    ("launcher", "program", "hosts"),
    [
        ("openmpi", "mpirun", ["--host", "node1:1,node2:1"]),
        ("mpich", "mpiexec.hydra", ["-hosts", "node1,node2"]),
        ("mpich", "mpirun", ["-ppn", "1"]),
        ("impi", "mpirun", ["-hosts", "node1,node2"]),
        ("mvapich", "mpirun", ["-n", "2"]),
    ],
)
def test_mpi_gets_variables_by_name_not_by_value(programs, monkeypatch, launcher, program, hosts):
    start = command_of(launcher, programs(program), monkeypatch, launcher_args=("--mca", "x", "1"))
    command = list(start.command)
    assert start.program == program
    assert " ".join(hosts) in " ".join(command)
    assert "NCCL_DEBUG" in " ".join(command)
    assert "NEOX_JOB_TOKEN" in " ".join(command)
    assert "secret" not in " ".join(command)
    assert command[-len(AGENT) - 3 :] == ["--mca", "x", "1", *AGENT]
    assert start.environment["NEOX_JOB_TOKEN"] == "secret"


@pytest.mark.parametrize(
    ("launcher", "needs"),
    [
        ("slurm", "srun"),
        ("openmpi", "mpirun.openmpi or mpirun"),
        ("mpich", "mpiexec.hydra or mpirun.mpich or mpirun"),
    ],
)
def test_a_launcher_that_is_missing_is_named_with_its_program(
    programs, monkeypatch, launcher, needs
):
    with pytest.raises(LaunchError, match=f"launcher '{launcher}' needs {needs}, which is not"):
        command_of(launcher, programs(), monkeypatch)


def travel(environ, tmp_path):
    return travelling_environment(environ, home=tmp_path / "home", working_directory=tmp_path)


def test_settings_travel_and_what_describes_a_machine_stays(tmp_path):
    settings = {
        "GLOO_SOCKET_IFNAME": "eth1",
        "NCCL_SOCKET_IFNAME": "ib0",
        "UCX_TLS": "tcp",
        "MV2_X": "1",
        "PYTHONPATH": "/x",
        "OMP_NUM_THREADS": "4",
        "TORCH_EXTENSIONS_DIR": "/t",
        "DS_ACCELERATOR": "cpu",
        "NEOX_LAUNCH_ID": "abc",
        "HF_HOME": "/h",
        "CUDA_HOME": "/c",
        "PATH": "/bin",
        "LD_LIBRARY_PATH": "/l",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_END_TIME": "1795552965",
        "SLURM_RESTART_COUNT": "1",
    }
    here = {
        "CUDA_VISIBLE_DEVICES": "0",
        "HOME": "/root",
        "TMPDIR": "/tmp",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS_PER_NODE": "8",
        "NEOX_JOB_TOKEN": "secret",
        "WANDB_API_KEY": "secret",
        "HF_TOKEN": "secret",
        "SSH_AUTH_SOCK": "/s",
    }
    assert travel(settings | here, tmp_path) == (settings, [])


def test_the_deepspeed_env_file_is_read_and_a_bad_line_is_told(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.deepspeed_env").write_text("NCCL_DEBUG=WARN\nFROM_HOME = 1\n")
    text = '\n# a comment\nexport NCCL_DEBUG=INFO\nQUOTED="a b"\nEMPTY=\nno value\n'
    (tmp_path / ".deepspeed_env").write_text(text)
    chosen, notes = travel({"NCCL_DEBUG": "TRACE"}, tmp_path)
    assert chosen == {"NCCL_DEBUG": "INFO", "FROM_HOME": "1", "QUOTED": "a b", "EMPTY": ""}
    assert notes == [f"{tmp_path}/.deepspeed_env:6: 'no value' is not NAME=VALUE; left out"]
    (tmp_path / "mine").write_text("A=1")
    assert travel({"DS_ENV_FILE": "mine"}, tmp_path)[0]["A"] == "1"


def test_the_job_file_is_the_users_alone_and_carries_token_and_keys(tmp_path):
    job = JobSecrets.new({"WANDB_API_KEY": "k", "OTHER": "x", "HF_TOKEN": ""})
    assert job.environment == {"WANDB_API_KEY": "k"}
    path = write_job_file(job, tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_job_file(path, {}) == job
    assert JobSecrets.new({}).token != job.token


def test_without_the_file_the_token_comes_from_the_environment_or_not_at_all(tmp_path):
    assert read_job_file(tmp_path / "gone", {"NEOX_JOB_TOKEN": "t"}) == JobSecrets("t", {})
    with pytest.raises(LaunchError, match=r"gone: .*start from a directory that all nodes share"):
        read_job_file(tmp_path / "gone", {})


def test_software_is_compared_by_version_and_our_code_by_content():
    ours = installed_software()
    assert set(ours) > {"python", "torch", "deepspeed", "megatron-core", "neox-ledger's code"}
    assert differences(ours, dict(ours)) == []
    code = "neox-ledger's code"
    assert differences(ours, ours | {"torch": "1.0", code: "0"}) == [
        f"{code} 0 instead of {ours[code]}",
        f"torch 1.0 instead of {ours['torch']}",
    ]


def test_addresses_lead_to_this_machine():
    with socket.create_server(("", 0)) as server:
        for address in own_addresses(["localhost", "no.such.host.invalid"]):
            with socket.create_connection((address, server.getsockname()[1]), timeout=5):
                pass
    assert is_loopback("127.0.1.1")
    assert not is_loopback("10.0.0.1")
