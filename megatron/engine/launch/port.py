"""A rendezvous port nobody else has, kept for this job until it ends."""

import contextlib
import socket
from collections.abc import Iterator

from megatron.base.errors import LaunchError

__all__ = ["DEFAULT_MASTER_PORT", "reserve_port"]

DEFAULT_MASTER_PORT = 29500  # NeoX's and DeepSpeed's


@contextlib.contextmanager
def reserve_port(wanted: int | None) -> Iterator[int]:
    """Yield the port for the ranks' rendezvous; while the context lasts no other launch takes it.

    Args:
        wanted: a port the user named, or None for the default one or, if that is taken, a free one.

    Raises:
        LaunchError: the port the user named is taken.
    """
    for port in [wanted] if wanted is not None else [DEFAULT_MASTER_PORT, 0]:
        try:
            reservation = _bind(port, may_be_closing=wanted is not None)
        except OSError as error:
            if wanted is not None:
                raise LaunchError(
                    f"master_port {wanted} is taken on this machine ({error.strerror}); another "
                    "job may be using it. Name another one, or none to have a free one chosen"
                ) from error
            continue
        break
    with reservation:
        yield reservation.getsockname()[1]


def _bind(port: int, *, may_be_closing: bool) -> socket.socket:
    # A socket that is bound but doesn't listen keeps other launchers away (they bind without
    # SO_REUSEADDR first), while rank 0, whose store binds with it, can listen there.
    # A port named by the user is taken even if connections of a finished job still linger on it.
    reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if may_be_closing:
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("", port))
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except BaseException:
        reservation.close()
        raise
    return reservation
