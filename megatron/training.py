"""NeoX's name for training, for scripts written for it; the work is in ``megatron.cli.train``."""

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.cli.train import PreparedTraining, prepare, train
from megatron.engine.distributed import rank_environment
from megatron.engine.loop import StopReason, Training
from megatron.engine.steps import evaluate, train_step
from megatron.neox_arguments import NeoXArgs

__all__ = [
    "collect_loss_for_unit_test",
    "forward_step",
    "prepared_training",
    "pretrain",
    "setup_model_and_optimizer",
]

# What setup_model_and_optimizer opened stays open as long as the process: NeoX has no close.
_opened = contextlib.ExitStack()
_prepared: dict[int, PreparedTraining] = {}


def pretrain(neox_args: NeoXArgs) -> StopReason:
    """Train as ``neox_args`` says, from building the model to the last evaluation."""
    # By name at every call, so that a patched function is the one that is called.
    return train(
        neox_args.to_run_config(),
        rank_environment(),
        on_loss=lambda loss: collect_loss_for_unit_test(loss),
    )


def setup_model_and_optimizer(
    neox_args: NeoXArgs, use_cache: bool = False, iteration: int | None = None
) -> tuple[Any, Any, Any, None]:
    """Build the model, load what ``neox_args.load`` names, and wrap it in a DeepSpeed engine.

    Args:
        neox_args: the configuration.
        use_cache: for generation, which is not supported here yet.
        iteration: load this step instead of the newest.

    Returns:
        The engine, its optimizer, its learning-rate scheduler, and None where NeoX has the
        reference model of preference training.
    """
    if use_cache:
        raise NotImplementedError("use_cache is known to NeoX, not supported here yet")
    if iteration is not None:
        neox_args.update_value("iteration", iteration)
    prepared = prepare(neox_args.to_run_config(), rank_environment(), _opened)
    engine = prepared.training.engine
    _prepared[id(engine)] = prepared
    return engine, engine.optimizer, engine.lr_scheduler, None


def forward_step(
    data_iterator: Iterator[Any] | None, model: Any, neox_args: NeoXArgs, *, is_train: bool = False
) -> float:
    """Return the mean loss of one global batch; with ``is_train`` an optimizer step is taken too.

    Args:
        data_iterator: micro batches ``(tokens, (labels, loss_mask))``; None for the training data
            of the configuration.
        model: the engine of :func:`setup_model_and_optimizer`.
        neox_args: unused, for NeoX's callers.
        is_train: whether the weights are updated.
    """
    training = prepared_training(model)
    batches = training.train_batches if data_iterator is None else data_iterator
    if is_train:
        return train_step(model, batches, training.loss_function, training.groups)
    return evaluate(model, batches, training.loss_function, training.groups, iterations=1)


def prepared_training(engine: Any) -> Training:
    """Return what :func:`setup_model_and_optimizer` prepared together with ``engine``.

    Raises:
        ValueError: the engine was built by something else.
    """
    if id(engine) not in _prepared:
        raise ValueError("this engine was not built by setup_model_and_optimizer")
    return _prepared[id(engine)].training


def collect_loss_for_unit_test(lm_loss: Any) -> None:
    """Do nothing. Called with every step's loss; NeoX's users' tests patch it."""
