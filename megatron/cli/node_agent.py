"""``python -m megatron.cli.node_agent``: runs one node's part of a job. The launcher starts it."""

import argparse
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron.base.errors import LaunchError, MegatronError
from megatron.base.exit_codes import CANNOT_LAUNCH, NODE_LOST
from megatron.engine.launch.agent import GraceTimes, run_ranks
from megatron.engine.launch.devices import count_devices
from megatron.engine.launch.head_link import HeadLink, connect_to_head
from megatron.engine.launch.job_channel import PROTOCOL, SILENCE_S, Message
from megatron.engine.launch.job_file import TOKEN_VARIABLE, JobSecrets, read_job_file
from megatron.engine.launch.placement import NodePlacement
from megatron.engine.launch.port import reserve_port
from megatron.engine.launch.software import digest_of_file, installed_software

__all__ = ["main"]

_CONNECT_S = 30.0
_AGAIN_S = 1.0
_MUSTER_S = 3600.0  # the launcher has the say on how long it waits for the other nodes
# By which an MPI library would take a rank for a process mpirun started.
_MPI_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "MPI_LOCAL", "HYDRA_", "MV2_COMM_WORLD_")
_ORDINALS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent and return its exit status: this node's, or 2 if no rank was started."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--head", required=True, help="ADDRESS[,ADDRESS...]:PORT of the launcher")
    parser.add_argument("--job-file", help="file with the job's token")
    parser.add_argument("--node", help="this host's name in the host file")
    options = parser.parse_args(argv)
    name = options.node or socket.gethostname()
    try:
        job = read_job_file(options.job_file, os.environ)
        addresses, _, port = options.head.rpartition(":")
        channel = connect_to_head(addresses.split(","), int(port), timeout_s=_CONNECT_S)
        link = HeadLink(channel)
        place = _be_admitted(link, job, options.node)
        return _take_part(link, place, job, options.job_file)
    except MegatronError as error:
        _delete(options.job_file)
        print(f"deepy: {name}: {error}", file=sys.stderr, flush=True)  # noqa: T201 - its words
        return CANNOT_LAUNCH
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _be_admitted(link: HeadLink, job: JobSecrets, node: str | None) -> Message:
    """Return this node's part of the job."""
    for attempt in itertools.count(1):
        introduction = _introduction(node, os.environ)
        link.tell("hello", token=job.token, attempt=attempt, **introduction)
        answer = link.wait_for("place", "again", timeout_s=SILENCE_S)
        if answer.kind == "place":
            break
        time.sleep(_AGAIN_S)
    return answer


def _introduction(node: str | None, environ: Mapping[str, str]) -> dict[str, object]:
    names = [node, environ.get("SLURMD_NODENAME"), socket.gethostname()]
    ordinals = [environ[name] for name in _ORDINALS if environ.get(name, "").isdecimal()]
    return {
        "protocol": PROTOCOL,
        "names": list(dict.fromkeys(name for name in names if name)),
        "ordinal": int(ordinals[0]) if ordinals else None,
        "software": installed_software(),
    }


def _take_part(link: HeadLink, place: Message, job: JobSecrets, job_file: str | None) -> int:
    environ = _environment(place, job)
    with ExitStack() as stack:
        try:
            os.chdir(place["working_directory"])
            port = None
            if place["node_index"] == 0:
                port = stack.enter_context(reserve_port(place["master_port"]))
        except (LaunchError, OSError) as error:
            link.tell("cannot", reason=str(error))
            raise LaunchError(str(error)) from error
        link.tell(
            "ready",
            devices=count_devices(environ),
            script=digest_of_file(place["user_script"]),
            port=port,
        )
        go = link.wait_for("go", timeout_s=_MUSTER_S)
        _delete(job_file)
        placement = NodePlacement(
            slots=tuple(place["slots"]),
            master_port=go["master_port"],
            master_addr=go["master_addr"],
            first_rank=place["first_rank"],
            world_size=place["world_size"],
            node_index=place["node_index"],
            num_nodes=place["num_nodes"],
        )
        settle_s, terminate_s = place["grace"]
        end = run_ranks(
            placement,
            place["user_script"],
            tuple(place["arguments"]),
            environ=environ,
            grace=GraceTimes(settle_s=settle_s, terminate_s=terminate_s),
            link=link,
        )
    # mpirun and srun may end the other nodes when one of their processes ends: so all end together.
    status = link.wait_for_the_end()
    return end.status or NODE_LOST if status is None else status


def _environment(place: Message, job: JobSecrets) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(_MPI_PREFIXES)}
    environ = own | dict(place["environment"]) | job.environment
    environ.pop(TOKEN_VARIABLE, None)
    return environ


def _delete(job_file: str | None) -> None:
    # The launcher has done so, unless the file was brought to a node that shares no directory.
    if job_file is not None:
        Path(job_file).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
