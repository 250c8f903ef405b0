"""The learning rate as a function of the optimizer steps taken, and the object DeepSpeed drives.

A *count* is the number of optimizer steps taken, from 0; a step that fp16 skipped for an overflow
isn't counted. Step N of a run without skips is therefore trained with the rate at count N - 1.
Two formulas exist: the one of NeoX's main branch, and the one of its tag v1.0 that Pythia was
trained with.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, TypeVar

from megatron.base.errors import CheckpointError, ConfigError
from megatron.config.groups.lr_scheduler import LRScheduler
from megatron.config.groups.optimizer import Optimizer
from megatron.config.groups.training import Training

__all__ = [
    "DecayStyle",
    "LearningRateSchedule",
    "LearningRateScheduler",
    "NeoxVersion",
    "ScheduleSettings",
    "continued_schedule",
]

DecayStyle = Literal["constant", "linear", "cosine", "exponential"]
NeoxVersion = Literal["main", "v1.0"]

_T = TypeVar("_T")

# Members of a checkpoint's scheduler state that describe the schedule; num_iters, the count, is
# the seventh.
_SCHEDULE_STATE_KEYS = ("start_lr", "warmup_iter", "decay_style", "end_iter", "min_lr")
_HALVING_RATE = 0.693  # NeoX's rounding of ln 2: an exponential decay ends at about half the peak


@dataclass(frozen=True)
class LearningRateSchedule:
    """A learning rate for every count, without end.

    Example:
        >>> schedule = LearningRateSchedule(
        ...     start_lr=1e-3, min_lr=1e-4, warmup_iter=2.0, end_iter=8, decay_style="cosine"
        ... )
        >>> [schedule.at(count) for count in (0, 1, 2, 5, 8)]
        [0.0005, 0.0005, 0.001, 0.00055, 0.0001]
    """

    start_lr: float  # the peak, reached at the end of the warm-up
    min_lr: float  # the floor of the decay; the warm-up may start below it
    warmup_iter: float  # counts the warm-up lasts; not rounded to a whole number
    end_iter: int  # count at which the decay ends
    decay_style: DecayStyle
    version: NeoxVersion = "main"
    is_clamped: bool = False  # stay at the end's rate; NeoX's cosine rises again beyond it

    def __post_init__(self) -> None:
        if self.end_iter < 1 or not 0 <= self.warmup_iter <= self.end_iter:
            raise ValueError(
                f"a schedule needs end_iter >= 1 and 0 <= warmup_iter <= end_iter, "
                f"got end_iter={self.end_iter} and warmup_iter={self.warmup_iter}"
            )

    def at(self, count: int) -> float:
        """Return the rate after ``count`` optimizer steps.

        Raises:
            ValueError: ``count`` is negative.
        """
        if count < 0:
            raise ValueError(f"the count of optimizer steps must be >= 0, got {count}")
        if self.is_clamped:
            count = min(count, self.end_iter)
        if self.version == "v1.0":
            return self._at_v1(count)
        if self.warmup_iter > 0 and count <= self.warmup_iter:
            # As in NeoX, above the peak at count 0 if the warm-up is shorter than one step.
            return self.start_lr * max(1, count) / self.warmup_iter
        return max(self._decayed(count - self.warmup_iter), self.min_lr)

    def _decayed(self, count: float) -> float:
        """Main's decay, ``count`` steps after the warm-up."""
        length = self.end_iter - self.warmup_iter
        if length == 0:  # all warm-up: whatever comes after it is past the end
            count = length = 1.0
        match self.decay_style:
            case "constant":
                return self.start_lr
            case "linear":
                return self.start_lr * (length - count) / length
            case "cosine":
                swing = (self.start_lr - self.min_lr) / 2
                return self.min_lr + swing * (math.cos(math.pi * count / length) + 1)
            case "exponential":
                return self.start_lr * math.exp(-_HALVING_RATE * count / length)

    def _at_v1(self, count: int) -> float:
        # Decays over the whole length rather than what the warm-up leaves of it, stands still for
        # the last warmup_iter counts, and knows min_lr only as a floor.
        moving = min(count, self.end_iter - self.warmup_iter)
        if self.warmup_iter > 0 and count <= self.warmup_iter:
            return self.start_lr * moving / self.warmup_iter
        progress = moving - self.warmup_iter
        match self.decay_style:
            case "constant":
                rate = self.start_lr
            case "linear":
                rate = self.start_lr * (self.end_iter - progress) / self.end_iter
            case "cosine":
                rate = self.start_lr / 2 * (math.cos(math.pi * progress / self.end_iter) + 1)
            case "exponential":
                rate = self.start_lr * math.exp(-_HALVING_RATE * progress / self.end_iter)
        return max(rate, self.min_lr)


@dataclass(frozen=True)
class ScheduleSettings:
    """What a configuration says of the learning rate, and what a resume may do about it."""

    start_lr: float
    min_lr: float
    warmup: float  # fraction of decay_iters
    decay_iters: int  # counts until the decay ends, at least 1
    decay_style: DecayStyle
    version: NeoxVersion = "main"
    overrides_checkpoint: bool = False  # on resume this configuration decides
    follows_checkpoint: bool = False  # on resume the checkpoint decides

    def __post_init__(self) -> None:
        if self.overrides_checkpoint and self.follows_checkpoint:
            raise ConfigError(
                "override_lr_scheduler and use_checkpoint_lr_scheduler are both true; the first "
                "keeps the configured schedule on resume, the second the checkpoint's: choose one"
            )
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup={self.warmup} must be a fraction between 0 and 1")

    @classmethod
    def from_config(
        cls,
        lr_scheduler: LRScheduler,
        optimizer: Optimizer,
        training: Training,
        *,
        neox_version: NeoxVersion = "main",
    ) -> Self:
        """Read the settings from the configuration's groups.

        Raises:
            ConfigError: a key that has a default was set to null.
        """
        if training.train_iters is None:
            raise ValueError("the schedule needs train_iters; train_epochs must be resolved first")
        decay_iters = lr_scheduler.lr_decay_iters
        if decay_iters is None:
            decay_iters = training.train_iters
            if lr_scheduler.lr_decay_fraction is not None:
                decay_iters = int(training.train_iters * lr_scheduler.lr_decay_fraction)
        return cls(
            start_lr=_given("lr", optimizer.lr),
            min_lr=_given("min_lr", lr_scheduler.min_lr),
            warmup=_given("warmup", lr_scheduler.warmup),
            decay_iters=max(1, decay_iters),
            decay_style=_given("lr_decay_style", lr_scheduler.lr_decay_style),
            version=neox_version,
            overrides_checkpoint=bool(lr_scheduler.override_lr_scheduler),
            follows_checkpoint=bool(lr_scheduler.use_checkpoint_lr_scheduler),
        )

    def schedule(self) -> LearningRateSchedule:
        """Return the schedule of a run that starts with these settings."""
        return LearningRateSchedule(
            start_lr=self.start_lr,
            min_lr=self.min_lr,
            warmup_iter=float(self.warmup * self.decay_iters),
            end_iter=self.decay_iters,
            decay_style=self.decay_style,
            version=self.version,
            is_clamped=self.follows_checkpoint,
        )


def _given(key: str, value: _T | None) -> _T:
    if value is None:
        raise ConfigError(f"{key} is null; the learning-rate schedule needs a value")
    return value


def continued_schedule(
    settings: ScheduleSettings, state: Mapping[str, Any]
) -> LearningRateSchedule:
    """Return the schedule a run goes on with after loading a checkpoint's scheduler state.

    Raises:
        CheckpointError: ``state`` lacks a member.
        ConfigError: the checkpoint's schedule is another one, and the configuration doesn't say
            which of the two holds. The message shows both at five steps, and the ways out.
    """
    _require_complete(state)
    configured = settings.schedule()
    if settings.overrides_checkpoint:
        return configured
    recorded = LearningRateSchedule(
        **{key: state[key] for key in _SCHEDULE_STATE_KEYS},
        version=settings.version,
        is_clamped=settings.follows_checkpoint,
    )
    if not settings.follows_checkpoint and recorded != configured:
        raise ConfigError(_mismatch(recorded, configured, state["num_iters"]))
    return recorded


def _require_complete(state: Mapping[str, Any]) -> None:
    missing = [key for key in (*_SCHEDULE_STATE_KEYS, "num_iters") if key not in state]
    if missing:
        raise CheckpointError(
            f"the checkpoint's lr_scheduler state lacks {', '.join(missing)} (it has "
            f"{', '.join(map(str, state)) or 'nothing'}); to start the schedule at 0 instead, set "
            "finetune or no_load_optim"
        )


def _mismatch(recorded: LearningRateSchedule, configured: LearningRateSchedule, count: int) -> str:
    differences = "; ".join(
        f"{key} {getattr(recorded, key)} in the checkpoint, {getattr(configured, key)} configured"
        for key in _SCHEDULE_STATE_KEYS
        if getattr(recorded, key) != getattr(configured, key)
    )
    last = max(recorded.end_iter, configured.end_iter, count + 1)
    steps = sorted({count + 1 + (last - count - 1) * quarter // 4 for quarter in range(5)})
    # What use_checkpoint_lr_scheduler would give, hence clamped.
    followed = replace(recorded, is_clamped=True)
    rates = "\n".join(
        f"    step {step:>9,}: {followed.at(step - 1):.6e} -> {configured.at(step - 1):.6e}"
        for step in steps
    )
    return (
        f"the learning-rate schedule is not the checkpoint's: {differences}\n"
        f"  learning rate, checkpoint's -> configured:\n{rates}\n"
        f"  ways out: lr_decay_iters: {recorded.end_iter} with the checkpoint's other values "
        "keeps the schedule exactly; override_lr_scheduler: true goes on with the configured one "
        "from here; use_checkpoint_lr_scheduler: true goes on with the checkpoint's and stays at "
        "its last rate"
    )


class HasParamGroups(Protocol):
    """An optimizer, as far as its learning rates go."""

    param_groups: list[dict[str, Any]]


class LearningRateScheduler:
    """Writes the schedule's rate into an optimizer's groups; made for DeepSpeed's engine.

    It holds the optimizer, not its ``param_groups``: torch replaces that list when it loads a
    state. Loading a state into the optimizer also brings back the rates it was saved with, so
    call :meth:`apply` after the last of a checkpoint's parts has been loaded.
    """

    def __init__(self, optimizer: HasParamGroups, settings: ScheduleSettings) -> None:
        self._optimizer = optimizer
        self._settings = settings
        self.schedule = settings.schedule()
        self.num_iters = 0
        self.apply()

    def step(self) -> None:
        """Count one optimizer step that was not skipped."""
        self.num_iters += 1
        self.apply()

    def apply(self) -> None:
        """Write the current rate into the optimizer's groups (muP: divided by ``width_mult``)."""
        rate = self.schedule.at(self.num_iters)
        for group in self._optimizer.param_groups:
            group["lr"] = rate / group["width_mult"] if "width_mult" in group else rate

    def get_lr(self) -> list[float]:
        """Return the rate of every group, as the next step will use it."""
        return [group["lr"] for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the state under NeoX's names."""
        return {
            "start_lr": self.schedule.start_lr,
            "warmup_iter": self.schedule.warmup_iter,
            "num_iters": self.num_iters,
            "decay_style": self.schedule.decay_style,
            "end_iter": self.schedule.end_iter,
            "min_lr": self.schedule.min_lr,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was saved; see :func:`continued_schedule` for what may differ."""
        self.schedule = continued_schedule(self._settings, state)
        self.num_iters = state["num_iters"]
        self.apply()
