"""What is known when it must be decided how a job goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatron.base.errors import ConfigError
from megatron.config.registry import resolve_alias
from megatron.config.yaml_files import read_config_files
from megatron.ledger.launches_file import EndedLaunch, read_launches
from megatron.ledger.queries.advance import AttemptAdvance, advances

__all__ = ["Job", "RunKeys", "Situation", "read_run_keys"]


@dataclass(frozen=True)
class RunKeys:
    """The keys of a configuration that say where a run is recorded and when it is finished."""

    save: Path | None
    train_iters: int | None  # None: train_epochs says how long the run is
    train_epochs: int | None


@dataclass(frozen=True)
class Job:
    """The batch job that asks, as far as there is one."""

    number: str | None  # SLURM's; None: not started by SLURM
    restarts: int = 0
    end_time: float | None = None  # of its time limit, seconds since the epoch
    submit_time: float | None = None  # of its last submission or requeue; None: not known

    @classmethod
    def of_environment(cls, environ: Mapping[str, str], *, submit_time: float | None) -> Self:
        """Read SLURM's variables."""
        restarts = environ.get("SLURM_RESTART_COUNT", "0")
        end_time = environ.get("SLURM_JOB_END_TIME", "")
        return cls(
            number=environ.get("SLURM_JOB_ID"),
            restarts=int(restarts) if restarts.isdecimal() else 0,
            end_time=float(end_time) if end_time.isdecimal() else None,
            submit_time=submit_time,
        )


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A run, its past launches, and the launch that has just ended."""

    status: int | None  # exit status of the launch; None: it is still to come
    keys: RunKeys
    attempts: Sequence[AttemptAdvance]  # oldest first
    launches: Sequence[EndedLaunch]  # oldest first
    job: Job
    since: float | None  # when the launch began; None: not told
    now: float
    tries: int  # launches without progress after which a job gives up

    @classmethod
    def read(cls, keys: RunKeys, **known: Any) -> Self:
        """Return the situation with what the run's directory says.

        Raises:
            OSError, RunDirectoryError: it cannot be read.
        """
        attempts = advances(keys.save) if keys.save is not None else []
        launches = read_launches(keys.save) if keys.save is not None else []
        return cls(keys=keys, attempts=attempts, launches=launches, **known)

    @property
    def newest(self) -> AttemptAdvance | None:
        """The run's newest attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def own_attempt(self) -> AttemptAdvance | None:
        """The attempt of the launch that has ended; None if it ended before it began one."""
        newest = self.newest
        if newest is None or self.status is None:
            return None
        if self.job.number is not None and newest.job is not None:
            is_own = (newest.job, newest.restarts) == (self.job.number, self.job.restarts)
        elif self.since is not None:
            is_own = newest.facts.started >= self.since
        else:
            known = self.launches[-1].attempt if self.launches else None
            is_own = known is None or newest.facts.number > known
        return newest if is_own else None

    @property
    def finished_step(self) -> int | None:
        """The run's last step, if its record says that all are done; else None."""
        stop = self.newest.facts.stop if self.newest is not None else None
        if self.newest is None or stop is None or stop.reason != "finished":
            return None
        keys = self.keys
        if keys.train_iters is not None:
            return stop.step if stop.step >= keys.train_iters else None
        is_same = self.newest.facts.config.get("train_epochs") == keys.train_epochs
        return stop.step if is_same else None


def read_run_keys(paths: Sequence[str]) -> RunKeys:
    """Read where the run of a configuration is recorded.

    Only these keys are looked at: the launch itself has checked the others, and they need to know
    the machines.

    Raises:
        ConfigError: the files cannot be read.
    """
    written, _, problems = read_config_files(paths)
    if problems:
        raise ConfigError(*problems)
    values = {resolve_alias(name): item.value for name, item in written.items()}
    save = values.get("save")
    return RunKeys(
        save=None if save is None else Path(str(save)),
        train_iters=_whole(values, "train_iters"),
        train_epochs=_whole(values, "train_epochs"),
    )


def _whole(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}={value!r} is not a whole number") from None
