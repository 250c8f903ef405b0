"""``deepy.py``: check a configuration on the launch node, say what it comes to, start the ranks."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from megatron.base.errors import ConfigError, MegatronError
from megatron.base.exit_codes import CANNOT_LAUNCH
from megatron.config.command_line import parse_command_line
from megatron.config.load import load_config
from megatron.config.outcomes import check_launch
from megatron.config.run_config import RunConfig
from megatron.config.transport import encode_config, spilled_files
from megatron.engine.launch.agent import GraceTimes, run_ranks
from megatron.engine.launch.devices import local_slots
from megatron.engine.launch.head import Job
from megatron.engine.launch.hosts import Hosts, choose_hosts, is_this_machine
from megatron.engine.launch.job_file import JobSecrets
from megatron.engine.launch.multi_node import launch_on_hosts
from megatron.engine.launch.placement import NodePlacement, rank_environment, usable_cores
from megatron.engine.launch.port import reserve_port
from megatron.engine.launch.travelling import travelling_environment

__all__ = ["main"]

_GRACE_VARIABLE = "DEEPY_GRACE_S"
_VALUE_WIDTH = 100  # characters of a value shown before the launch


def main(argv: Sequence[str] | None = None) -> int:
    """Run deepy.py with ``argv`` (None: the process's own) and return its exit status.

    0 if every rank ended with 0; the status of the rank that failed first, or 128 + N for signal
    N; 2 if nothing was started.
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
        hosts = choose_hosts(config.runner, world_size=config.topology.world_size, environ=environ)
        _print_arguments(config)
        return _launch(command.user_script, config, hosts, environ)
    except MegatronError as error:
        _say(str(error))
        return CANNOT_LAUNCH
    except KeyboardInterrupt:
        return 130


def _launch(user_script: str, config: RunConfig, hosts: Hosts, environ: Mapping[str, str]) -> int:
    runner = config.runner
    is_slurm = bool(config.other.deepspeed_slurm)
    if runner.hostfile is not None and hosts.hostfile is None:
        _say(f"note: there is no hostfile {runner.hostfile}; launching on this machine alone")
    if (runner.include or runner.exclude) and (runner.num_gpus or 0) > 0:
        _say(f"note: num_gpus={runner.num_gpus} has no effect beside include or exclude")
    is_multi = len(hosts.slots) > 1 or runner.force_multi or is_slurm
    # Every host sees the working directory, or it would not see the script either.
    arguments = encode_config(config, spill_directory=os.getcwd() if is_multi else None)
    with ExitStack() as stack:
        for file in spilled_files(arguments):
            stack.callback(file.unlink, missing_ok=True)
        if is_multi:
            return _launch_on_hosts(user_script, arguments, config, hosts, environ)
        port = stack.enter_context(reserve_port(_named_port(config, environ)))
        (host, slots), *_ = hosts.slots.items()
        if not is_this_machine(host):
            _say(
                f"note: the only host, {host}, is taken to be this machine; force_multi: true "
                "starts ranks there through ssh"
            )
        placement = NodePlacement(slots=tuple(slots), master_port=port)
        threads = rank_environment(placement, 0, environ, usable_cores())["OMP_NUM_THREADS"]
        _say(f"starting {len(slots)} ranks; rendezvous port {port}, OMP_NUM_THREADS={threads}")
        return run_ranks(
            placement, user_script, tuple(arguments), environ=environ, grace=_grace(environ)
        ).status


def _launch_on_hosts(
    user_script: str,
    arguments: Sequence[str],
    config: RunConfig,
    hosts: Hosts,
    environ: Mapping[str, str],
) -> int:
    runner = config.runner
    is_slurm = bool(config.other.deepspeed_slurm)
    launcher = "slurm" if is_slurm else runner.launcher or "pdsh"
    travelling, notes = travelling_environment(
        environ, home=os.path.expanduser("~"), working_directory=os.getcwd()
    )
    for note in notes:
        _say(f"note: {note}")
    secrets = JobSecrets.new(environ)
    job = Job(
        hosts=hosts.slots,
        user_script=user_script,
        arguments=tuple(arguments),
        environment=travelling,
        working_directory=os.getcwd(),
        token=secrets.token,
        master_addr=environ.get("MASTER_ADDR") or runner.master_addr,
        master_port=_named_port(config, environ),
    )
    launcher_args = []
    if launcher == "slurm":
        for name in ("comment", "account"):
            if value := getattr(runner, name):
                launcher_args.append(f"--{name}={value}")
    return launch_on_hosts(
        job,
        secrets,
        launcher=launcher,
        launcher_args=launcher_args,
        environ=environ,
        grace=_grace(environ),
        checks_ssh=not runner.no_ssh_check,
    )


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
