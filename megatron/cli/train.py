"""``train.py``: from a configuration to a trained model, on every rank."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron.base.errors import MegatronError
from megatron.base.exit_codes import CANNOT_LAUNCH, STOPPED
from megatron.base.progress import progress_of_this_process
from megatron.base.startup import StartUp
from megatron.cli.model_of_config import DTYPES, model_settings, tensor_parallel_of
from megatron.cli.resume_plan import PlannedLaunch
from megatron.cli.run_check import RunCheck
from megatron.cli.run_data import open_run_data
from megatron.cli.run_ledger import node_names, open_journal
from megatron.cli.run_reports import build_reporter
from megatron.cli.run_stopping import open_stopping
from megatron.cli.saved_state import Checkpoints
from megatron.config.load import RunConfig
from megatron.config.transport import load_transported
from megatron.engine.agreement import together
from megatron.engine.assembly import ModuleSettings, build_module, initialize_engine
from megatron.engine.deepspeed_config import deepspeed_settings
from megatron.engine.determinism import use_deterministic_kernels
from megatron.engine.distributed import ProcessGroups, RankEnvironment, connect, rank_environment
from megatron.engine.loop import LoopSettings, StopReason, Training, run
from megatron.engine.optimizer_numerics import OptimizerNumerics
from megatron.engine.optimizers import build_optimizer
from megatron.engine.progress_reports import HangLimits, Phases
from megatron.engine.seeding import prepare_random_state, tensor_parallel_stream
from megatron.engine.steps import LossFunction
from megatron.engine.stop_signals import StopSignals, stop_signals
from megatron.ledger.run_directory import is_save_step
from megatron.model.layer_plan import layer_plan
from megatron.model.loss import cross_entropy_loss
from megatron.model.parallel_layers import TensorParallel
from megatron.model.settings import ModelSettings
from megatron.optim.param_groups import weight_decay_groups
from megatron.optim.schedules import LearningRateScheduler, ScheduleSettings

__all__ = ["PreparedTraining", "main", "prepare", "train"]


def main(
    input_args: Sequence[str] | None = None, overwrite_values: Mapping[str, Any] | None = None
) -> int:
    """Train as the transported configuration says; NeoX's entry point of ``train.py``.

    Args:
        input_args: command line, ``sys.argv[1:]`` if None: what ``deepy.py`` passes to ranks.
        overwrite_values: keys that win over the configuration.

    Returns:
        The exit status: 0, or that of a run that was told to stop.
    """
    startup = StartUp.of_this_process()
    startup.enter("configuration")
    config = load_transported(input_args, overwrite_values)
    return train(config, rank_environment(), startup=startup).exit_code


def train(
    config: RunConfig,
    environment: RankEnvironment,
    *,
    on_loss: Callable[[float], None] = lambda loss: None,
    startup: StartUp | None = None,
) -> StopReason:
    """Train on this rank, together with all others of ``environment``.

    Signals that ask to stop end the process at once until the loop begins, and are told by the
    result from then on.

    Args:
        config: the resolved configuration.
        environment: this rank's number and how to find the others.
        on_loss: told every step's loss.
        startup: of this process; None: it has begun just now.

    Raises:
        MegatronError: before anything is built, if data, checkpoint and configuration don't fit.
    """
    with contextlib.ExitStack() as stack:
        signals = stop_signals()
        signals.begin()
        stack.callback(signals.end)
        try:
            ready = prepare(config, environment, stack, on_loss=on_loss, startup=startup)
        except MegatronError as error:
            if error.exit_code is None:
                error.exit_code = CANNOT_LAUNCH
            raise
        journal = ready.training.journal
        signals.keep()
        try:
            reason = _told_to_stop(ready.training.groups, signals)
            if reason is None:
                reason = run(ready.training, ready.settings, first_step=ready.first_step)
                if journal is not None:
                    journal.flush()
        except BaseException as error:
            if journal is not None:
                with contextlib.suppress(
                    MegatronError, OSError
                ):  # the first error is the one to tell
                    journal.close(f"failed: {type(error).__name__}")
            raise
        if journal is not None:
            journal.close(reason.value)
        return reason


@dataclasses.dataclass(frozen=True)
class PreparedTraining:
    """A training that has loaded what it goes on from, and not taken a step yet."""

    training: Training
    settings: LoopSettings
    first_step: int


def prepare(
    config: RunConfig,
    environment: RankEnvironment,
    stack: contextlib.ExitStack,
    *,
    on_loss: Callable[[float], None] = lambda loss: None,
    startup: StartUp | None = None,
) -> PreparedTraining:
    """Connect, open data, build the model, load; what must be closed is put on ``stack``."""
    startup = startup or StartUp.from_now("start")
    phases = Phases(progress_of_this_process(), HangLimits(config.ledger.hang_timeout))

    def begin(phase: str) -> None:
        startup.enter(phase)
        phases.enter(phase)

    begin("connect")
    if config.ledger.deterministic:
        use_deterministic_kernels()
    groups = connect(environment, config.topology, backend=config.other.distributed_backend)
    begin("verify")
    checkpoints = Checkpoints.open(config, groups)
    stack.callback(checkpoints.close)
    launch = checkpoints.launch
    begin("data")
    data = open_run_data(config, groups, launch.plan)
    facts = together(groups, functools.partial(checkpoints.facts, data.tokenizer.vocab_size))
    settings = together(groups, functools.partial(model_settings, config, facts))
    tensor_parallel = tensor_parallel_of(groups)
    loss_function = functools.partial(_loss, tensor_parallel)
    prepare_random_state(
        groups,
        config.other.seed,
        partition_activations=config.training.partition_activations,
    )
    begin("model")
    module = _build_module(config, groups, settings, tensor_parallel, loss_function)
    begin("load")
    checkpoints.load_weights(module, settings, facts)
    begin("engine")
    engine, gradient_norm = _build_engine(config, groups, module, launch.plan.train_iters)
    begin("load")
    step = checkpoints.load_state(engine, settings, facts)
    begin("record")
    reporter = build_reporter(config, groups, facts, launch.plan.train_iters)
    stack.callback(reporter.close)
    sources = data.open_sources(stack, vocabulary_rows=facts.padded_vocab_size)
    check = None
    if config.training.checkpoint_validation_with_forward_pass:
        check = RunCheck.open(config, groups, engine, facts, data, sources["train"])
        checkpoints.compare_forward_pass(check)
    nodes = node_names(groups)
    journal = together(
        groups,
        lambda: open_journal(
            config, groups, launch, checkpoints.stored_facts(facts), sources, nodes
        ),
    )
    saving = checkpoints.saver(engine, facts, journal, check)
    stopping = open_stopping(
        groups,
        saving,
        stop_signals(),
        exit_duration_in_mins=config.ledger.exit_duration_in_mins,
    )
    stack.callback(stopping.close)
    training = Training(
        engine=engine,
        groups=groups,
        loss_function=loss_function,
        train_batches=sources["train"],
        valid_batches=sources["valid"],
        test_batches=sources["test"],
        gradient_norm=gradient_norm,
        reporter=reporter,
        stopping=stopping,
        journal=journal,
        saving=saving,
        on_loss=on_loss,
        startup=startup,
        phases=phases,
    )
    return PreparedTraining(training, _loop_settings(config, launch), first_step=step + 1)


def _told_to_stop(groups: ProcessGroups, signals: StopSignals) -> StopReason | None:
    """Return why not to begin, on all ranks or on none; a signal that comes later is the loop's.

    A rank that got one before it came here has ended at once. Then this one, if it got the same, is
    not to fail because of the other.
    """
    mine = None if signals.wish is None else signals.wish.name
    try:
        told = next(filter(None, groups.gather(mine)), None)
    except RuntimeError:
        if signals.wish is None:
            raise
        told = signals.wish.name
    return None if told is None else StopReason(f"signal {told}", STOPPED)


def _loss(
    tensor_parallel: TensorParallel,
    logits: torch.Tensor,
    labels: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    return cross_entropy_loss(logits, *labels, tensor_parallel)


def _build_module(
    config: RunConfig,
    groups: ProcessGroups,
    settings: ModelSettings,
    tensor_parallel: TensorParallel,
    loss_function: LossFunction,
) -> torch.nn.Module:
    plan = layer_plan(
        settings,
        tensor_parallel,
        seed=config.other.seed,
        dtype=DTYPES[config.model.precision],
        device=groups.device,
        dropout_rng=tensor_parallel_stream,
    )
    training = config.training
    layout = ModuleSettings(
        partition_method=config.parallelism.pipe_partition_method,
        checkpoint_interval=(
            training.checkpoint_num_layers if training.checkpoint_activations else 0
        ),
    )
    return build_module(plan, groups, loss_function, layout)


def _build_engine(
    config: RunConfig, groups: ProcessGroups, module: torch.nn.Module, train_iters: int
) -> tuple[Any, Callable[[], float | None]]:
    """Wrap ``module``; train_iters is the configured number, or what train_epochs comes to."""
    weight_decay = config.training.weight_decay
    optimizer = build_optimizer(
        weight_decay_groups(module, weight_decay),
        optimizer_type=config.optimizer.optimizer_type,
        params=config.deepspeed.optimizer["params"],
        weight_decay=weight_decay,
    )
    schedule = ScheduleSettings.from_config(
        config.lr_scheduler,
        config.optimizer,
        dataclasses.replace(config.training, train_iters=train_iters),
        neox_version=config.ledger.neox_version,
    )
    keys = config.deepspeed
    return initialize_engine(
        module,
        groups,
        optimizer,
        LearningRateScheduler(optimizer, schedule),
        deepspeed_settings(
            config.non_default("deepspeed"),
            geometry=config.geometry,
            precision=config.model.precision,
            fp16=keys.fp16,
            bf16=keys.bf16,
            gradient_clipping=keys.gradient_clipping,
            zero_optimization=keys.zero_optimization,
            extra=keys.deepspeed_extra_args,
        ),
        OptimizerNumerics.of(config.ledger.neox_version),
    )


def _loop_settings(config: RunConfig, launch: PlannedLaunch) -> LoopSettings:
    training = config.training
    return LoopSettings(
        train_iters=launch.plan.train_iters,
        evaluates_first=launch.plan.evaluates_first,
        eval_interval=training.eval_interval,
        eval_iters=training.eval_iters,
        exit_interval=training.exit_interval,
        is_save_step=functools.partial(
            is_save_step,
            checkpoint_factor=training.checkpoint_factor,
            checkpoint_scale=training.checkpoint_scale,
            extra_save_iters=training.extra_save_iters or (),
        ),
    )
