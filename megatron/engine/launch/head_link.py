"""A node agent's end of the job channel."""

import select
import socket
import time
from collections.abc import Sequence
from typing import Any

from megatron.base.errors import LaunchError
from megatron.engine.launch.job_channel import BEAT_S, PAUSED_S, SILENCE_S, Channel, Message

__all__ = ["HeadLink", "connect_to_head"]

_TRY_S = 3.0  # for one address; one of another network may never answer
_PAUSE_S = 0.2
_POLL_S = 1.0


class HeadLink:
    """What an agent hears from the launcher and tells it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._heard_at = self._said_at = self._looked_at = time.monotonic()

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self.channel.fileno()

    def tell(self, kind: str, **fields: Any) -> None:
        """Tell the launcher something."""
        self._said_at = time.monotonic()
        self.channel.send(kind, **fields)

    def take(self) -> list[Message]:
        """Return what the launcher said since the last call."""
        now = time.monotonic()
        if now > self._looked_at + PAUSED_S:
            self._heard_at += now - self._looked_at  # it was us who slept
        self._looked_at = now
        messages = self.channel.receive()
        if messages:
            self._heard_at = now
        return [message for message in messages if message.kind != "beat"]

    def keep_alive(self) -> None:
        """Say that we live, if it is time to, and send what is left to send."""
        if time.monotonic() >= self._said_at + BEAT_S:
            self.tell("beat")
        self.channel.flush()

    @property
    def loss(self) -> str | None:
        """Why the launcher has to be given up; None as long as it is there."""
        if self.channel.is_broken:
            return "the connection to the launcher has ended"
        silent_s = time.monotonic() - self._heard_at
        if silent_s <= SILENCE_S:
            return None
        return f"nothing heard from the launcher for {silent_s:.0f} s"

    def wait_for(self, *kinds: str, timeout_s: float) -> Message:
        """Return the next message, which has to be one of ``kinds``.

        Raises:
            LaunchError: the launcher is gone, refuses us, or says something else.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.loss is None:
            for message in self.take():
                if message.kind in kinds:
                    return message
                reason = message.fields.get("reason", f"it said {message.kind!r}")
                raise LaunchError(f"the launcher ended this node's part: {reason}")
            self._pause()
        raise LaunchError(self.loss or f"the launcher didn't answer in {timeout_s:.0f} s")

    def wait_for_the_end(self) -> int | None:
        """Return the job's status when the launcher needs us no more; None if it is gone."""
        while self.loss is None:
            for message in self.take():
                if message.kind == "leave":
                    return int(message["status"])
            self._pause()
        return None

    def _pause(self) -> None:
        self.keep_alive()
        select.select([self], [], [], _POLL_S)


def connect_to_head(addresses: Sequence[str], port: int, *, timeout_s: float) -> Channel:
    """Return a channel to the launcher, by the first of its addresses that answers.

    Raises:
        LaunchError: none does within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    problems = {}
    while True:
        for address in addresses:
            try:
                return Channel(socket.create_connection((address, port), timeout=_TRY_S))
            except OSError as error:
                problems[address] = error.strerror or str(error)
        if time.monotonic() > deadline:
            tried = ", ".join(f"{address} ({problem})" for address, problem in problems.items())
            raise LaunchError(
                f"the launcher can't be reached at port {port} of {tried}; is a firewall between "
                "the nodes?"
            )
        time.sleep(_PAUSE_S)
