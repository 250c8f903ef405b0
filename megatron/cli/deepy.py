"""``deepy.py``: check a configuration on the launch node, say what it comes to, start the ranks."""

import os
import secrets
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron.base.errors import ConfigError, MegatronError
from megatron.base.exit_codes import CANNOT_LAUNCH, NODE_LOST
from megatron.cli.launch_end import note_end
from megatron.config.command_line import parse_command_line
from megatron.config.load import load_config
from megatron.config.outcomes import check_launch
from megatron.config.run_config import RunConfig
from megatron.config.transport import encode_config, spilled_files
from megatron.engine.launch.agent import GraceTimes, run_ranks
from megatron.engine.launch.conclusion import JobEnd
from megatron.engine.launch.devices import local_slots
from megatron.engine.launch.hosts import Hosts, choose_hosts, is_this_machine
from megatron.engine.launch.job_file import JobSecrets
from megatron.engine.launch.job_nodes import Job
from megatron.engine.launch.multi_node import launch_on_hosts
from megatron.engine.launch.placement import NodePlacement, rank_environment, usable_cores
from megatron.engine.launch.port import reserve_port
from megatron.engine.launch.travelling import travelling_environment
from megatron.ledger.environment import LAUNCH_VARIABLE

__all__ = ["main"]

_GRACE_VARIABLE = "DEEPY_GRACE_S"
_VALUE_WIDTH = 100  # characters of a value shown before the launch


def main(argv: Sequence[str] | None = None) -> int:
    """Run deepy.py with ``argv`` (None: the process's own) and return its exit status.

    The statuses are those of ``base.exit_codes``: 0 only if every rank ended with 0.
    """
    try:
        command = parse_command_line(sys.argv[1:] if argv is None else argv)
        environ = dict(os.environ)
        config = load_config(
            command.config_paths,
            command.overrides,
            local_slots=lambda: local_slots(environ),
            environ=environ,
        )
        for notice in check_launch(config):
            _say(f"note: {notice}")
        hosts = choose_hosts(
            config.runner,
            world_size=config.topology.world_size,
            environ=environ,
            uses_slurm=config.other.deepspeed_slurm,
        )
        _print_arguments(config)
        return _launch(command.user_script, config, hosts, environ)
    except MegatronError as error:
        _say(str(error))
        return NODE_LOST if error.exit_code == NODE_LOST else CANNOT_LAUNCH
    except KeyboardInterrupt:
        return 130


def _launch(user_script: str, config: RunConfig, hosts: Hosts, environ: Mapping[str, str]) -> int:
    runner = config.runner
    if runner.hostfile is not None and hosts.hostfile is None and not hosts.is_allocation:
        _say(f"note: there is no hostfile {runner.hostfile}; launching on this machine alone")
    if (runner.include or runner.exclude) and (runner.num_gpus or 0) > 0:
        _say(f"note: num_gpus={runner.num_gpus} has no effect beside include or exclude")
    launch = secrets.token_hex(6)
    environ = {**environ, LAUNCH_VARIABLE: launch}
    uses_agents = (
        len(hosts.slots) > 1
        or runner.force_multi
        or config.other.deepspeed_slurm
        # SLURM tells a job's steps when they are preempted: one node, too, is started by srun.
        or hosts.is_allocation
    )
    # Every host sees the working directory, or it would not see the script either.
    arguments = encode_config(config, spill_directory=os.getcwd() if uses_agents else None)
    with ExitStack() as stack:
        for file in spilled_files(arguments):
            stack.callback(file.unlink, missing_ok=True)
        launch_there = _launch_on_hosts if uses_agents else _launch_here
        end = launch_there(user_script, tuple(arguments), config, hosts, environ)
    if end is None:
        return 128 + signal.SIGINT
    if config.training.save and (text := note_end(Path(config.training.save), launch, end)):
        _say(text)
    return end.status


def _launch_here(
    user_script: str,
    arguments: tuple[str, ...],
    config: RunConfig,
    hosts: Hosts,
    environ: Mapping[str, str],
) -> JobEnd:
    (host, slots), *_ = hosts.slots.items()
    if not is_this_machine(host):
        _say(
            f"note: the only host, {host}, is taken to be this machine; force_multi: true "
            "starts ranks there through ssh"
        )
    with reserve_port(_named_port(config, environ)) as port:
        placement = NodePlacement(slots=tuple(slots), master_port=port)
        threads = rank_environment(placement, 0, environ, usable_cores())["OMP_NUM_THREADS"]
        _say(f"starting {len(slots)} ranks; rendezvous port {port}, OMP_NUM_THREADS={threads}")
        return run_ranks(placement, user_script, arguments, environ=environ, grace=_grace(environ))


def _launch_on_hosts(
    user_script: str,
    arguments: tuple[str, ...],
    config: RunConfig,
    hosts: Hosts,
    environ: Mapping[str, str],
) -> JobEnd | None:
    runner = config.runner
    travelling, notes = travelling_environment(
        environ, home=os.path.expanduser("~"), working_directory=os.getcwd()
    )
    for note in notes:
        _say(f"note: {note}")
    job_secrets = JobSecrets.new(environ)
    job = Job(
        hosts=hosts.slots,
        user_script=user_script,
        arguments=arguments,
        environment=travelling,
        working_directory=os.getcwd(),
        token=job_secrets.token,
        master_addr=environ.get("MASTER_ADDR") or runner.master_addr,
        master_port=_named_port(config, environ),
    )
    launcher = runner.launcher or "pdsh"
    if config.other.deepspeed_slurm and "launcher" not in config.written:
        launcher = "slurm"
    return launch_on_hosts(
        job,
        job_secrets,
        launcher=launcher,
        launcher_args=_launcher_arguments(config, launcher),
        environ=environ,
        grace=_grace(environ),
        checks_ssh=not runner.no_ssh_check,
    )


def _launcher_arguments(config: RunConfig, launcher: str) -> list[str]:
    try:
        given = shlex.split(config.ledger.launcher_args or "")
    except ValueError as error:
        raise ConfigError(f"launcher_args={config.ledger.launcher_args!r}: {error}") from error
    if launcher != "slurm":
        return given
    slurm = {"comment": config.runner.comment, "account": config.runner.account}
    return [f"--{name}={value}" for name, value in slurm.items() if value] + given


def _named_port(config: RunConfig, environ: Mapping[str, str]) -> int | None:
    """Return the rendezvous port the user named, if any: the key, or else ``$MASTER_PORT``."""
    if "master_port" in config.written and config.runner.master_port:
        return config.runner.master_port
    text = environ.get("MASTER_PORT")
    if not text:
        return None
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ConfigError(f"$MASTER_PORT={text!r} is not a port (1 to 65535)")
    return int(text)


def _grace(environ: Mapping[str, str]) -> GraceTimes:
    text = environ.get(_GRACE_VARIABLE)
    if text is None:
        return GraceTimes()
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds < 1e6:
        raise ConfigError(f"${_GRACE_VARIABLE}={text!r} is not a number of seconds, 0 or more")
    return GraceTimes(terminate_s=seconds)


def _print_arguments(config: RunConfig) -> None:
    """Print every key that differs from its default, with the file it is from."""
    changed = config.non_default()
    changed.pop("config_files", None)
    lines = [f"{len(changed)} arguments differ from their defaults:"]
    for name, value in sorted(changed.items()):
        text = str(value)
        if len(text) > _VALUE_WIDTH:
            text = text[: _VALUE_WIDTH - 3] + "..."
        origin = config.origin(name) if name in config.origins else "worked out"
        origin = "command line" if origin == "override" else origin
        lines.append(f"  {name + ' ':.<40} {text}  ({origin})")
    _print("\n".join(lines))


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command's own output


def _say(text: str) -> None:
    print(f"deepy: {text}", file=sys.stderr, flush=True)  # noqa: T201 - a command's own output
