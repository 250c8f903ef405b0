"""How a job goes on after a launch: done, once more, or stop. Arithmetic on records only."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.base.exit_codes import CANNOT_LAUNCH, FINISHED, HUNG, NODE_LOST, STOPPED
from megatron.cli.slurm.situation import Situation
from megatron.ledger.launches_file import Action, EndedLaunch
from megatron.ledger.queries.advance import AttemptAdvance, attempts_without_advance

__all__ = ["Verdict", "verdict"]

_NEAR_THE_END = 0.2  # of a job's time
_TOLD_TO_STOP = {
    STOPPED,
    # ended by it: it came before there was anything to save, or twice
    *(128 + one for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)),
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do, and why."""

    action: Action
    reason: str  # a sentence
    stalled: Sequence[AttemptAdvance] = ()  # attempts in a row that came no further, oldest first
    unbegun: int = 0  # launches since then that ended before they began an attempt
    counts: bool = False  # whether a launch without an attempt counts as one without progress


def verdict(situation: Situation) -> Verdict:
    """Decide how a job goes on.

    That a run is finished is decided by its record, whatever the exit status is: launchers have
    been seen to end with 0 when they were killed.
    """
    keys, status = situation.keys, situation.status
    finished = situation.finished_step
    if finished is not None:
        return Verdict(action="done", reason=f"the run is finished: step {finished} is its last")
    if status is None:
        return _before(situation)
    if keys.save is None:
        return _unrecorded(status)
    if status == CANNOT_LAUNCH:
        return Verdict(
            action="stop",
            reason="exit status 2: configuration, data, checkpoint, hosts or command line have to "
            "change before anything can be trained; the log's end says which and how",
        )
    own = situation.own_attempt
    stop = own.facts.stop if own is not None else None
    if status == FINISHED and stop is not None and stop.reason == "exit_interval":
        return Verdict(
            action="done",
            reason=f"stopped at step {stop.step}{_of(situation)} because of exit_interval; the run "
            "is not finished, and the same command goes on",
        )
    is_own_failure = status < 128 and status not in (STOPPED, HUNG, NODE_LOST)
    if own is None and is_own_failure and not _has_trained(situation):
        return Verdict(
            action="stop",
            reason=f"{_ended(status)} before the first step, and this job has never trained: "
            "another try would end the same way; the log's end says why",
            counts=True,
        )
    return _again(situation, own)


def _before(situation: Situation) -> Verdict:
    """Decide whether to launch at all."""
    last = situation.launches[-1] if situation.launches else None
    job = situation.job
    if (
        last is not None
        and last.action == "stop"
        and job.submit_time is not None
        and last.job != job.number
        and job.submit_time < last.time
    ):
        return Verdict(
            action="stop",
            reason=f"job {last.job}, before this one, has stopped the run: {last.reason}. "
            "Submit again when the cause is gone",
        )
    return _again(situation, None)


def _unrecorded(status: int) -> Verdict:
    if status == FINISHED:
        return Verdict(action="done", reason="exit status 0; without save nothing is recorded")
    return Verdict(
        action="stop",
        reason=f"{_ended(status)}, and without save another launch would begin at step 0",
    )


def _again(situation: Situation, own: AttemptAdvance | None) -> Verdict:
    """Requeue, unless the last launches have come to nothing."""
    status = situation.status
    counts = status is not None and own is None and _counts(situation, status)
    unbegun = _unbegun(situation) + counts
    stalled = attempts_without_advance(_failures(situation))
    tried = len(stalled) + unbegun
    if tried >= situation.tries:
        return Verdict(
            action="stop",
            reason=_no_progress(stalled, unbegun),
            stalled=stalled,
            unbegun=unbegun,
            counts=counts,
        )
    count = f"; {tried} of {situation.tries} tries without progress" if tried else ""
    if status is None:
        newest = situation.newest
        after = f"after step {newest.last_step}" if newest is not None else "from the start"
        reason = f"the run goes on {after}{_of(situation)}{count}"
    elif own is None:
        reason = f"{_ended(status)} before its first step{count}"
    else:
        reason = f"{_ended(status)} after step {own.last_step}{_of(situation)}{count}"
    return Verdict(action="requeue", reason=reason, stalled=stalled, unbegun=unbegun, counts=counts)


def _counts(situation: Situation, status: int) -> bool:
    """Whether a launch that ended before it began an attempt is a try without progress.

    Being preempted while loading is nobody's fault, and may happen often in a row. Reaching the
    time limit while loading would go on for ever.
    """
    job = situation.job
    if status not in _TOLD_TO_STOP:
        return True
    if job.end_time is None or situation.since is None:
        return False
    left, whole = job.end_time - situation.now, job.end_time - situation.since
    return left < _NEAR_THE_END * whole


def _unbegun(situation: Situation) -> int:
    """Count the newest launches in a row that ended before they began an attempt."""
    newest = situation.newest.facts.number if situation.newest is not None else None
    count = 0
    for launch in reversed(_launches(situation)):
        if launch.has_begun or launch.attempt != newest:
            break
        count += launch.counts
    return count


def _has_trained(situation: Situation) -> bool:
    """Whether an earlier launch of this job, or of the jobs it follows, has trained."""
    own = situation.own_attempt
    return any(attempt is not own for attempt in _attempts(situation))


def _launches(situation: Situation) -> list[EndedLaunch]:
    """Return the launches whose failures count, oldest first.

    Those since the run was given up or finished: somebody has acted then. And only this job's, and
    of jobs that had ended before when this one waited already (a chain): whoever submits a job
    begins the count anew.
    """
    job = situation.job
    found: list[EndedLaunch] = []
    for launch in reversed(situation.launches):
        is_chained = job.submit_time is None or job.submit_time < launch.time
        if launch.action != "requeue" or not (launch.job == job.number or is_chained):
            break
        found.append(launch)
    return found[::-1]


def _attempts(situation: Situation) -> list[AttemptAdvance]:
    """Return the attempts whose failures count: see :func:`_launches`."""
    known = {launch.attempt for launch in _launches(situation) if launch.has_begun}
    closed = [launch.attempt or 0 for launch in situation.launches if launch.action != "requeue"]
    own, job = situation.own_attempt, situation.job.number
    return [
        attempt
        for attempt in situation.attempts
        if attempt.facts.number > max(closed, default=0)
        and (attempt is own or attempt.facts.number in known or (job and attempt.job == job))
    ]


def _failures(situation: Situation) -> list[AttemptAdvance]:
    """Return the attempts, without those that were told to stop before they came anywhere."""
    told = {one.attempt for one in _launches(situation) if one.status in _TOLD_TO_STOP}
    own = situation.own_attempt
    if own is not None and situation.status in _TOLD_TO_STOP:
        told.add(own.facts.number)
    return [
        attempt
        for attempt in _attempts(situation)
        if attempt.has_advanced or attempt.facts.number not in told
    ]


def _ended(status: int) -> str:
    """Say what an exit status means."""
    known = {
        FINISHED: "the launch ended with exit status 0, its run unfinished",
        STOPPED: "told to stop",
        HUNG: "a rank hung",
        NODE_LOST: "a node was lost",
    }
    if status in known:
        return known[status]
    if status > 128:
        return f"ended by signal {status - 128}"
    return f"failed with exit status {status}"


def _of(situation: Situation) -> str:
    train_iters = situation.keys.train_iters
    return "" if train_iters is None else f" of {train_iters}"


def _no_progress(stalled: Sequence[AttemptAdvance], unbegun: int) -> str:
    parts = []
    if stalled:
        last = max(attempt.last_step for attempt in stalled)
        parts.append(
            f"{len(stalled)} attempts in a row recorded no step after {last} and saved nothing new"
        )
    if unbegun:
        parts.append(f"{unbegun} launch{'es' if unbegun > 1 else ''} ended before a first step")
    return "no progress: " + "; then ".join(parts)
