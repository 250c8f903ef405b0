"""Actions that succeed on every rank or fail on every rank."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron.base.errors import MegatronError
from megatron.engine.distributed import ProcessGroups

__all__ = ["PeerFailedError", "raise_together", "report_of", "together"]

T = TypeVar("T")


class PeerFailedError(MegatronError):
    """Another rank could not do its part, so this one stops too."""


def together(groups: ProcessGroups, action: Callable[[], T]) -> T:
    """Run ``action`` on this rank while every other rank runs its own, and wait for all.

    ``action`` must not communicate with other ranks on its own if it may fail before doing so.

    Raises:
        Exception: what ``action`` raised here. If other ranks raised the same, the first of them
            is its teller.
        PeerFailedError: it worked here, but not on the ranks the message names.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as raised:  # noqa: BLE001 - re-raised below, once the peers know
        error = raised
    raise_together(error, groups.gather(report_of(error)))
    return result  # type: ignore[return-value]


def report_of(error: Exception | None) -> str | None:
    """Return what other ranks are told of an error; None if there is none."""
    return None if error is None else f"{type(error).__name__}: {error}"


def raise_together(error: Exception | None, reports: Sequence[str | None]) -> None:
    """Raise on every rank if one of them has an error; for what gathers reports along the way.

    Args:
        error: this rank's.
        reports: :func:`report_of` every rank's, in rank order.

    Raises:
        Exception, PeerFailedError: see :func:`together`.
    """
    if error is not None:
        if isinstance(error, MegatronError) and error.teller is None:
            error.teller = reports.index(report_of(error))
        raise error
    failed = {rank: text for rank, text in enumerate(reports) if text is not None}
    if failed:
        peer_failed = PeerFailedError(_describe(failed, len(reports)))
        peer_failed.teller = min(failed)
        raise peer_failed


def _describe(failed: dict[int, str], world_size: int) -> str:
    first = min(failed)
    others = f" ({len(failed)} of {world_size} ranks failed)" if len(failed) > 1 else ""
    return f"rank {first} failed{others}: {failed[first]}"
