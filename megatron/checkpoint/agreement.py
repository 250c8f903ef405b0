"""All ranks go on, or all of them raise the same error."""

from collections.abc import Callable
from typing import Any, TypeVar

from megatron.base.errors import CheckpointError, MegatronError

__all__ = ["Gather", "all_or_none", "require_agreement"]

T = TypeVar("T")
_LISTED = 8  # of the ranks that have one problem

Gather = Callable[[Any], list[Any]]
"""Return the argument of every rank, in rank order, on every rank."""


def require_agreement(problem: str | None, gather: Gather) -> None:
    """Raise on every rank if any rank has a problem.

    Raises:
        CheckpointError: names each rank with its problem.
    """
    problems: dict[str, list[int]] = {}
    for rank, reported in enumerate(gather(problem)):
        if reported is not None:
            problems.setdefault(reported, []).append(rank)
    if problems:
        lines = [f"{_ranks(ranks)}: {reported}" for reported, ranks in problems.items()]
        error = CheckpointError("\n".join(lines))
        error.teller = min(rank for ranks in problems.values() for rank in ranks)
        raise error


def all_or_none(action: Callable[[], T], gather: Gather) -> T:
    """Run ``action``, which must not communicate, on this rank and wait for the others.

    Raises:
        CheckpointError: it failed on the ranks that the message names, perhaps this one.
    """
    result: T | None = None
    problem: str | None = None
    cause: Exception | None = None
    try:
        result = action()
    except Exception as error:  # noqa: BLE001 - the peers wait for this rank's answer
        known = isinstance(error, MegatronError | OSError)
        problem = str(error) if known else f"{type(error).__name__}: {error}"
        cause = error
    try:
        require_agreement(problem, gather)
    except CheckpointError as error:
        raise error from cause
    return result  # type: ignore[return-value] # None only if T is


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = len(ranks) - _LISTED
    return (
        "ranks " + ", ".join(map(str, ranks[:_LISTED])) + (f" and {more} more" if more > 0 else "")
    )
