"""Steps, saves and evaluations in NeoX's order (spec/training.md §5, spec/checkpoint.md §4)."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.base.errors import CheckpointError, MegatronError, RunDirectoryError
from megatron.base.exit_codes import FINISHED, STOPPED
from megatron.base.startup import StartUp
from megatron.engine.distributed import ProcessGroups
from megatron.engine.journal import Journal
from megatron.engine.progress_reports import Phases
from megatron.engine.reports import Reporter
from megatron.engine.saving import RunSaver
from megatron.engine.steps import LossFunction, MicroBatchSource, evaluate, train_step
from megatron.engine.stopping import Stop, Stopping
from megatron.ledger.attempts import EvaluationRecord, StepRecord

__all__ = ["DivergenceError", "LoopSettings", "StopReason", "Training", "run"]

MAX_CONSECUTIVE_SKIPS = 50  # NeoX gives up after this many fp16 overflows in a row


class DivergenceError(MegatronError):
    """The fp16 loss scale found no value at which gradients are finite."""


@dataclass(frozen=True)
class StopReason:
    """Why the loop ended."""

    value: str  # as the attempt's record says it
    exit_code: int = FINISHED


_FINISHED = StopReason("finished")  # train_iters steps are done
_EXIT_INTERVAL = StopReason("exit_interval")  # where the configuration says, without a save


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
    stopping: Stopping
    journal: Journal | None  # None: the run isn't saved, and so nothing is recorded
    saving: RunSaver | None  # None: the run isn't saved
    on_loss: Callable[[float], None]
    startup: StartUp  # of this process; over when the first step is done
    phases: Phases = field(default_factory=Phases)  # told to who looks for hangs


def run(training: Training, settings: LoopSettings, *, first_step: int) -> StopReason:
    """Train from ``first_step`` to ``train_iters``, or until a stop; then all is saved.

    A save in flight is waited for, whether training ends well or not.

    Raises:
        CheckpointError: a checkpoint could not be saved.
        DivergenceError: too many fp16 overflows in a row.
        RunDirectoryError: what was read isn't what the lineage says, or the run directory is
            another job's now.
    """
    try:
        return _train(training, settings, first_step)
    except BaseException:
        training.phases.fail()
        if training.saving is not None:
            training.saving.settle()
        raise


def _train(training: Training, settings: LoopSettings, first_step: int) -> StopReason:
    saving = training.saving
    training.reporter.start(first_step - 1)
    if first_step == 1 and saving is not None and settings.is_save_step(0):
        training.startup.enter("first save")
        training.phases.save()
        saving.save(0, False)
    if settings.evaluates_first:
        training.startup.enter("evaluation")
        _, stop = _evaluate_validation(training, settings, first_step - 1)
        if stop is not None:
            return _stop(training, stop, first_step - 1, is_saved=True)
    training.startup.enter("first step")
    skips_in_a_row = 0
    for step in range(first_step, settings.train_iters + 1):
        training.phases.step(step)
        record, loss_scale = _take_step(training, step)
        if step == first_step:
            _note_startup(training)
        skips_in_a_row = skips_in_a_row + 1 if record.skipped else 0
        if skips_in_a_row >= MAX_CONSECUTIVE_SKIPS:
            raise DivergenceError(
                f"step {step}: {skips_in_a_row} consecutive steps overflowed; the loss scale is "
                f"down to {loss_scale}. Lower the learning rate, check the data of these steps, "
                "or train in bfloat16"
            )
        training.reporter.step(record, loss_scale=loss_scale)
        stop = training.stopping.beat()
        if saving is not None:
            saving.poll()
        evaluation_due = (
            bool(settings.eval_interval)
            and step % settings.eval_interval == 0
            and training.valid_batches is not None
        )
        if saving is not None and settings.is_save_step(step) and not _is_failure(stop):
            training.phases.save()
            saving.save(step, evaluation_due)
        if evaluation_due and stop is None:
            evaluation_due, stop = _evaluate_validation(training, settings, step)
        if stop is not None:
            return _stop(training, stop, step, evaluation_due=evaluation_due)
        if settings.exit_interval and step % settings.exit_interval == 0:
            training.phases.finish()
            if saving is not None:
                saving.finish()
            training.groups.barrier()
            training.reporter.line(f"stopping at iteration {step}: exit_interval is reached")
            return _EXIT_INTERVAL
    return _finish(training, settings, is_loaded=settings.train_iters == first_step - 1)


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


def _note_startup(training: Training) -> None:
    training.startup.finish()
    training.reporter.line(f"{training.startup}")
    if training.journal is not None:
        training.journal.started(training.startup.seconds)


def _evaluate_validation(
    training: Training, settings: LoopSettings, step: int
) -> tuple[bool, Stop | None]:
    """Evaluate; return whether that is still due, and why to stop now, if there is a reason."""
    if training.valid_batches is None:
        return False, None
    loss, stop = _evaluate(training, "valid", training.valid_batches, settings, step)
    if loss is not None:
        training.reporter.evaluation("validation", loss, step=step, when=f"iteration {step}")
    return loss is None, stop


def _evaluate(
    training: Training,
    stream: str,
    batches: MicroBatchSource,
    settings: LoopSettings,
    step: int,
    *,
    at_end: bool = False,
) -> tuple[float | None, Stop | None]:
    """Return the loss, and why to stop now; without a loss if that came before the last batch.

    An evaluation that isn't done is as if it had never begun.
    """
    position = batches.position
    stop: Stop | None = None
    training.phases.evaluation()

    def goes_on() -> bool:
        nonlocal stop
        training.phases.batch()
        stop = training.stopping.beat()
        return stop is None

    loss = evaluate(
        training.engine,
        batches,
        training.loss_function,
        training.groups,
        iterations=settings.eval_iters,
        goes_on=goes_on,
    )
    if training.journal is not None and loss is not None:
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
    return loss, stop


def _finish(training: Training, settings: LoopSettings, *, is_loaded: bool) -> StopReason:
    """Evaluate once more; these evaluations move no cursor, so that a run can be extended."""
    step, saving = settings.train_iters, training.saving
    is_saved = is_loaded or step == 0
    if training.valid_batches is not None:
        loss, stop = _evaluate(
            training, "valid", training.valid_batches, settings, step, at_end=True
        )
        if loss is not None:
            when = "the end of training for val data"
            training.reporter.evaluation("validation", loss, step=step, when=when)
        if stop is not None:
            return _stop(training, stop, step, is_saved=is_saved)
    training.phases.finish()
    if saving is not None and not is_saved:
        saving.finish()
        if saving.committed_step != step:
            saving.save(step, False)
    if training.test_batches is not None:
        loss, stop = _evaluate(training, "test", training.test_batches, settings, step, at_end=True)
        if loss is not None:
            when = "the end of training for test data"
            training.reporter.evaluation("test", loss, step=step, when=when)
        if stop is not None:
            return _stop(training, stop, step, is_saved=is_saved)
    training.phases.finish()
    if saving is not None:
        saving.finish()
        if not is_saved and saving.committed_step != step:
            raise CheckpointError(
                f"training is done, but its last checkpoint, of step {step}, could not be saved; "
                "start the same command again when it can"
            )
    return _FINISHED


def _stop(
    training: Training,
    stop: Stop,
    step: int,
    *,
    evaluation_due: bool = False,
    is_saved: bool = False,
) -> StopReason:
    """Save, and tell why training ends here.

    Args:
        training: of this rank.
        stop: why.
        step: the last one done.
        evaluation_due: an evaluation after ``step`` is still to be done.
        is_saved: what there is to save was loaded.
    """
    if stop.error is not None:
        error = RunDirectoryError(stop.error)
        error.teller = 0
        raise error
    training.phases.finish()
    saving = training.saving
    told = f" ({stop.told})" if stop.told else ""
    training.reporter.line(f"stopping at iteration {step}: {stop.reason}{told}")
    if saving is not None:
        saving.finish()
        if not is_saved and saving.committed_step != step:
            saving.save(step, evaluation_due)
            saving.finish()
            if saving.committed_step != step:
                raise CheckpointError(
                    f"stopped at step {step} ({stop.reason}), but its checkpoint could not be "
                    "saved; the steps since the last one are done again"
                )
        training.reporter.line(f"stopped at iteration {step}; the same command goes on from there")
    training.groups.barrier()
    return StopReason(stop.reason, STOPPED)


def _is_failure(stop: Stop | None) -> bool:
    return stop is not None and stop.error is not None
