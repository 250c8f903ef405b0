"""By which addresses other machines may reach this one."""

import fcntl
import socket
import struct
from collections.abc import Sequence

__all__ = ["is_loopback", "own_addresses"]

_SIOCGIFADDR = 0x8915
_LIMIT = 8
_ASKED_HOSTS = 4  # a name server that doesn't answer takes its time for each


def own_addresses(hosts: Sequence[str]) -> list[str]:
    """Return this machine's addresses, those first that ``hosts`` are reached from."""
    found: list[str] = []
    for host in hosts[:_ASKED_HOSTS]:
        found += _addresses_towards(host)
    for _, interface in socket.if_nameindex():
        found += _address_of(interface)
    unique = sorted(dict.fromkeys(found), key=lambda address: ":" in address)  # IPv4 first
    outside = [address for address in unique if not is_loopback(address)]
    return (outside or ["127.0.0.1"])[:_LIMIT]


def is_loopback(address: str) -> bool:
    """Whether an address means the machine that uses it."""
    return address.startswith("127.") or address == "::1"


def _addresses_towards(host: str) -> list[str]:
    try:
        answers = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return []  # a name that only ssh knows
    found = []
    for family, kind, protocol, _, target in answers:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)  # sends nothing: the kernel only chooses a route
                found.append(str(probe.getsockname()[0]))
        except OSError:
            continue
    return found


def _address_of(interface: str) -> list[str]:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
        except OSError:
            return []  # it has no address
    return [socket.inet_ntoa(answer[20:24])]
