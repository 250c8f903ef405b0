"""What launcher and node agents say to each other: JSON lines over TCP.

    launcher (head)                        node agent
                  <── hello                 token, who it is, versions of the software
    place    ──>                            its slots, environment, script; or `refuse`
                  <── ready                 devices, digest of the script, a free port
    go       ──>                            where the ranks meet; the ranks start
    beat     <──>  beat                     each BEAT_S seconds
    signal   ──>                            passed on to the ranks
                  <── failed, hung          the first bad news of a node
    end      ──>                            end your ranks
                  <── ended                 how every rank of the node ended
    leave    ──>                            everybody is done

A side that hears nothing for SILENCE_S seconds gives the other up. The token, which only the user
can read, keeps other users' programs out; nothing here hides what is said from who can listen to
the network.
"""

import json
import socket
from dataclasses import dataclass
from typing import Any

from megatron.base.errors import LaunchError

__all__ = ["BEAT_S", "CONNECT_S", "PAUSED_S", "PROTOCOL", "SILENCE_S", "Channel", "Message"]

PROTOCOL = 1
BEAT_S = 5.0
SILENCE_S = 30.0
PAUSED_S = 10.0  # who didn't look for so long was stopped (`scontrol suspend`), not left alone
CONNECT_S = 120.0  # for all agents to come; a cold network file system is slow
_LINE_LIMIT_BYTES = 64 << 20  # a configuration with a long list of files is the longest message
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Message:
    """One thing said."""

    kind: str
    fields: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise LaunchError(f"the {self.kind!r} message has no {name!r}") from None


class Channel:
    """One end of a connection. Nothing here blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._received = bytearray()
        self._unsent = bytearray()
        self.is_broken = False

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._connection.fileno()

    @property
    def local_address(self) -> str:
        """The address of this machine that the other side sees."""
        return str(self._connection.getsockname()[0]).removeprefix("::ffff:")

    @property
    def peer_address(self) -> str:
        """The other side's address."""
        return str(self._connection.getpeername()[0]).removeprefix("::ffff:")

    @property
    def has_unsent(self) -> bool:
        """Whether :meth:`flush` has work to do."""
        return bool(self._unsent) and not self.is_broken

    def send(self, kind: str, **fields: Any) -> None:
        """Say something; to a broken connection, nothing."""
        self._unsent += json.dumps({"kind": kind, **fields}).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what the connection takes now."""
        while self._unsent and not self.is_broken:
            try:
                del self._unsent[: self._connection.send(self._unsent)]
            except BlockingIOError:
                return
            except OSError:
                self.is_broken = True

    def receive(self) -> list[Message]:
        """Return what has arrived; afterwards ``is_broken`` says whether more can come."""
        while not self.is_broken:
            try:
                chunk = self._connection.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except OSError:
                chunk = b""
            self.is_broken = not chunk or len(self._received) > _LINE_LIMIT_BYTES
            self._received += chunk
        *lines, rest = self._received.split(b"\n")
        self._received = rest
        try:
            return [_read(line) for line in lines]
        except ValueError:
            self.is_broken = True  # it doesn't speak our language
            return []

    def close(self) -> None:
        """Close the connection."""
        self.is_broken = True
        self._connection.close()


def _read(line: bytes | bytearray) -> Message:
    fields = json.loads(line)
    if not isinstance(fields, dict) or not isinstance(kind := fields.pop("kind", None), str):
        raise ValueError("not a message")
    return Message(kind, fields)
