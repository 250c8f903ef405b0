"""Steps, saves and evaluations in NeoX's order (spec/training.md §5, spec/checkpoint.md §4)."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron.base.errors import CheckpointError, MegatronError
from megatron.engine.distributed import ProcessGroups
from megatron.engine.journal import Journal
from megatron.engine.reports import Reporter
from megatron.engine.saving import RunSaver
from megatron.engine.steps import LossFunction, MicroBatchSource, evaluate, train_step
from megatron.ledger.attempts import EvaluationRecord, StepRecord

__all__ = ["DivergenceError", "LoopSettings", "StopReason", "Training", "run"]

MAX_CONSECUTIVE_SKIPS = 50  # NeoX gives up after this many fp16 overflows in a row


class DivergenceError(MegatronError):
    """The fp16 loss scale found no value at which gradients are finite."""


class StopReason(Enum):
    """Why the loop ended."""

    FINISHED = "finished"  # train_iters steps are done
    EXIT_INTERVAL = "exit_interval"  # stopped where the configuration says, without a save


@dataclass(frozen=True)
class LoopSettings:
    """When what happens. Steps count from 1."""

    train_iters: int
    eval_interval: int | None  # steps between evaluations; None: only at the end
    eval_iters: int  # global batches per evaluation
    exit_interval: int | None
    evaluates_first: bool  # the checkpoint was saved before its step's evaluation
    is_save_step: Callable[[int], bool]


@dataclass
class Training:
    """Everything a running training holds on this rank."""

    engine: Any  # DeepSpeed's
    groups: ProcessGroups
    loss_function: LossFunction
    train_batches: MicroBatchSource
    valid_batches: MicroBatchSource | None
    test_batches: MicroBatchSource | None
    gradient_norm: Callable[[], float | None]
    reporter: Reporter
    journal: Journal | None  # None: the run isn't saved, and so nothing is recorded
    saving: RunSaver | None  # None: the run isn't saved
    on_loss: Callable[[float], None]


def run(training: Training, settings: LoopSettings, *, first_step: int) -> StopReason:
    """Train from ``first_step`` to ``train_iters``.

    A save in flight is waited for, whether training ends well or not.

    Raises:
        CheckpointError: a checkpoint could not be saved.
        DivergenceError: too many fp16 overflows in a row.
        RunDirectoryError: what was read isn't what the lineage says.
        Terminated: SIGTERM came while a checkpoint was written.
    """
    try:
        return _train(training, settings, first_step)
    except BaseException as error:
        if training.saving is not None:
            training.saving.settle(error)
        raise


def _train(training: Training, settings: LoopSettings, first_step: int) -> StopReason:
    saving = training.saving
    training.reporter.start(first_step - 1)
    if first_step == 1 and saving is not None and settings.is_save_step(0):
        saving.save(0, False)
    if settings.evaluates_first:
        _evaluate_validation(training, settings, first_step - 1)
    skips_in_a_row = 0
    for step in range(first_step, settings.train_iters + 1):
        record, loss_scale = _take_step(training, step)
        skips_in_a_row = skips_in_a_row + 1 if record.skipped else 0
        if skips_in_a_row >= MAX_CONSECUTIVE_SKIPS:
            raise DivergenceError(
                f"step {step}: {skips_in_a_row} consecutive steps overflowed; the loss scale is "
                f"down to {loss_scale}. Lower the learning rate, check the data of these steps, "
                "or train in bfloat16"
            )
        training.reporter.step(record, loss_scale=loss_scale)
        if saving is not None:
            saving.poll()
        is_evaluated = bool(settings.eval_interval) and step % settings.eval_interval == 0
        if saving is not None and settings.is_save_step(step):
            saving.save(step, is_evaluated and training.valid_batches is not None)
        if is_evaluated:
            _evaluate_validation(training, settings, step)
        if settings.exit_interval and step % settings.exit_interval == 0:
            if saving is not None:
                saving.finish()
            training.groups.barrier()
            training.reporter.line(f"stopping at iteration {step}: exit_interval is reached")
            return StopReason.EXIT_INTERVAL
    _finish(training, settings, is_loaded=settings.train_iters == first_step - 1)
    return StopReason.FINISHED


def _take_step(training: Training, step: int) -> tuple[StepRecord, float | None]:
    engine = training.engine
    skipped_before = engine.skipped_steps
    position = training.train_batches.position
    started = time.perf_counter()
    loss = train_step(engine, training.train_batches, training.loss_function, training.groups)
    training.on_loss(loss)
    record = StepRecord(
        step=step,
        position=position,
        samples=engine.train_batch_size(),
        loss=loss,
        lr=engine.lr_scheduler.get_lr()[0],
        grad_norm=training.gradient_norm(),
        skipped=engine.skipped_steps > skipped_before,
        seconds=time.perf_counter() - started,
    )
    if training.journal is not None:
        training.journal.step(record)
    return record, engine.optimizer.loss_scale if engine.fp16_enabled() else None


def _evaluate_validation(training: Training, settings: LoopSettings, step: int) -> None:
    if training.valid_batches is None:
        return
    loss = _evaluate(training, "valid", training.valid_batches, settings, step)
    training.reporter.evaluation("validation", loss, step=step, when=f"iteration {step}")


def _evaluate(
    training: Training,
    stream: str,
    batches: MicroBatchSource,
    settings: LoopSettings,
    step: int,
    *,
    at_end: bool = False,
) -> float:
    position = batches.position
    loss = evaluate(
        training.engine,
        batches,
        training.loss_function,
        training.groups,
        iterations=settings.eval_iters,
    )
    if training.journal is not None:
        record = EvaluationRecord(
            stream=stream,
            after_step=step,
            position=position,
            samples=batches.position - position,
            digest="",  # the journal's to know
            loss=loss,
            at_end=at_end,
        )
        training.journal.evaluation(record)
    return loss


def _finish(training: Training, settings: LoopSettings, *, is_loaded: bool) -> None:
    """Evaluate once more; these evaluations move no cursor, so that a run can be extended."""
    step = settings.train_iters
    if training.valid_batches is not None:
        loss = _evaluate(training, "valid", training.valid_batches, settings, step, at_end=True)
        when = "the end of training for val data"
        training.reporter.evaluation("validation", loss, step=step, when=when)
    saving = training.saving
    if saving is not None and step > 0 and not is_loaded:
        saving.finish()
        if saving.committed_step != step:
            saving.save(step, False)
    if training.test_batches is not None:
        loss = _evaluate(training, "test", training.test_batches, settings, step, at_end=True)
        when = "the end of training for test data"
        training.reporter.evaluation("test", loss, step=step, when=when)
    if saving is not None:
        saving.finish()
        if step > 0 and not is_loaded and saving.committed_step != step:
            raise CheckpointError(
                f"training is done, but its last checkpoint, of step {step}, could not be saved; "
                "start the same command again when it can"
            )
