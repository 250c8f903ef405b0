"""Which hosts and slots a job may use: MPI-style host files and DeepSpeed's filters.

A host file has one ``host slots=N`` per line; ``#`` starts a comment. A slot is room for one rank:
a GPU, or on machines without GPUs a process. A filter is ``host[:slot,slot][@host...]``.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.base.errors import ConfigError
from megatron.config.slurm import allocated_hosts

__all__ = [
    "DEFAULT_HOSTFILE",
    "ListedHosts",
    "find_hostfile",
    "list_hosts",
    "parse_hostfile",
    "select_hosts",
]

DEFAULT_HOSTFILE = "/job/hostfile"

_ENTRY = re.compile(r"(?P<host>\S+)\s+slots\s*=\s*(?P<slots>\d+)")


@dataclass(frozen=True)
class ListedHosts:
    """The hosts there are, before filters."""

    slots: dict[str, int]  # by host
    source: str  # where that is from, in words
    hostfile: Path | None = None
    is_allocation: bool = False  # they are those of the SLURM job we are in


def list_hosts(
    hostfile: str | None,
    *,
    num_gpus: int | None,
    uses_slurm: bool,
    local_slots: Callable[[], int],
    environ: Mapping[str, str],
) -> ListedHosts:
    """Return the hosts of a launch: the host file's, the SLURM allocation's, or this machine.

    Args:
        hostfile: the key's value.
        num_gpus: the key's value; without a host file it is the number of slots.
        uses_slurm: whether SLURM is to start the ranks.
        local_slots: answers how many devices this machine has.
        environ: the launcher's environment.

    Raises:
        ConfigError: the host file is no good.
    """
    path = find_hostfile(hostfile, environ)
    if path is not None:
        return ListedHosts(parse_hostfile(path), f"hostfile {path}", hostfile=path)
    if uses_slurm:
        slots = allocated_hosts(environ, slots=num_gpus, local_slots=local_slots)
        if slots is not None:
            job = environ.get("SLURM_JOB_ID", "")
            return ListedHosts(slots, f"SLURM job {job}".strip(), is_allocation=True)
    if num_gpus is not None and num_gpus > 0:
        return ListedHosts({"localhost": num_gpus}, f"num_gpus={num_gpus}")
    return ListedHosts({"localhost": local_slots()}, "this machine")


def find_hostfile(configured: str | None, environ: Mapping[str, str]) -> Path | None:
    """Return the host file of a launch: the configured one, ``$DLTS_HOSTFILE`` or the default one.

    Returns:
        None if the first of these that is named doesn't exist: as in NeoX, whose example
        configurations name one that isn't there, the job then runs on this machine alone.
    """
    path = Path(configured or environ.get("DLTS_HOSTFILE") or DEFAULT_HOSTFILE)
    return path if path.exists() else None


def parse_hostfile(path: str | Path) -> dict[str, int]:
    """Return the number of slots of every host, in the file's order.

    Raises:
        ConfigError: the file cannot be read, a line is not ``host slots=N``, a host stands there
            twice, or there is no host at all. Every bad line is reported, with its number.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"hostfile {path} cannot be read: {reason}") from error
    slots: dict[str, int] = {}
    first_line: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        match = _ENTRY.fullmatch(entry)
        if match is None or int(match["slots"]) < 1:
            problems.append(f"{path}:{number}: {entry!r} is not 'host slots=N' with N at least 1")
        elif match["host"] in slots:
            host = match["host"]
            problems.append(
                f"{path}:{number}: host {host!r} is already listed in line {first_line[host]}; "
                "give each host one line with all its slots"
            )
        else:
            slots[match["host"]] = int(match["slots"])
            first_line[match["host"]] = number
    if not slots and not problems:
        problems.append(f"{path}: no host is listed; write one 'host slots=N' per line")
    if problems:
        raise ConfigError(*problems)
    return slots


def select_hosts(
    hosts: Mapping[str, int],
    *,
    include: str | None = None,
    exclude: str | None = None,
    num_nodes: int | None = None,
    num_gpus: int | None = None,
) -> dict[str, list[int]]:
    """Return the slot numbers to use on every host, in the order of ``hosts``.

    The filter comes first, then the first ``num_nodes`` hosts, then the first ``num_gpus`` slots of
    each. None, and any number below 1, means all. As in NeoX's launcher, ``num_gpus`` is left
    aside when there is a filter, which says exactly which slots to use.

    Example:
        >>> select_hosts({"a": 4, "b": 4}, include="a:0,2@b", num_nodes=1)
        {'a': [0, 2]}

    Raises:
        ConfigError: a filter or number asks for a host or slot that is not there, both filters are
            given, or nothing is left.
    """
    include, exclude = include or "", exclude or ""
    if include and exclude:
        raise ConfigError(
            f"include ({include!r}) and exclude ({exclude!r}) are both set; only one can be"
        )
    available = {host: list(range(slots)) for host, slots in hosts.items()}
    selected = available
    if include:
        wanted = _parse_filter("include", include, hosts)
        selected = {host: wanted[host] for host in hosts if host in wanted}
    elif exclude:
        unwanted = _parse_filter("exclude", exclude, hosts)
        selected = {
            host: [slot for slot in slots if slot not in unwanted.get(host, ())]
            for host, slots in available.items()
        }
        selected = {host: slots for host, slots in selected.items() if slots}
        if not selected:
            raise ConfigError(f"exclude {exclude!r} leaves no slot on any of {_listed(hosts)}")
    if num_nodes is not None and num_nodes > 0:
        if num_nodes > len(selected):
            raise ConfigError(
                f"num_nodes={num_nodes}, but there are only {len(selected)} hosts to use: "
                f"{_listed({host: len(slots) for host, slots in selected.items()})}"
            )
        selected = dict(list(selected.items())[:num_nodes])
    if num_gpus is not None and num_gpus > 0 and not (include or exclude):
        short = {host: len(slots) for host, slots in selected.items() if len(slots) < num_gpus}
        if short:
            raise ConfigError(
                f"num_gpus={num_gpus} asks for more ranks than slots on {_listed(short)}; "
                "lower num_gpus or raise the slots in the hostfile"
            )
        selected = {host: slots[:num_gpus] for host, slots in selected.items()}
    return selected


def _parse_filter(key: str, text: str, hosts: Mapping[str, int]) -> dict[str, list[int]]:
    problems = []
    wanted: dict[str, set[int]] = {}
    for part in text.split("@"):
        host, colon, slot_list = part.strip().partition(":")
        if host not in hosts:
            problems.append(f"{key} {text!r}: host {host!r} is not among {_listed(hosts)}")
            continue
        chosen = wanted.setdefault(host, set())
        if not colon:
            chosen.update(range(hosts[host]))
            continue
        for slot in slot_list.split(","):
            if not slot.strip().isdecimal():
                problems.append(
                    f"{key} {text!r}: {slot!r} is not a slot number; write it like host1@host2:0,2"
                )
            elif int(slot) >= hosts[host]:
                problems.append(
                    f"{key} {text!r}: host {host!r} has no slot {int(slot)}, "
                    f"its {hosts[host]} slots are 0 to {hosts[host] - 1}"
                )
            else:
                chosen.add(int(slot))
    if problems:
        raise ConfigError(*problems)
    return {host: sorted(slots) for host, slots in wanted.items()}


def _listed(hosts: Mapping[str, int]) -> str:
    shown = [f"{host} ({slots} slot{'s' if slots != 1 else ''})" for host, slots in hosts.items()]
    if len(shown) > 8:
        shown[8:] = [f"... {len(shown) - 8} more"]
    return ", ".join(shown)
