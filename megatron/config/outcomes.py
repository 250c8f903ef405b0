"""At launch: which keys work, which have no effect here, which stop the run.

Parsing accepts every key NeoX knows. Before anything is started each key that differs from its
default meets one of four outcomes, declared beside the key (``megatron.config.declare``); none is
silently ignored.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from megatron.base.errors import ConfigError
from megatron.config.declare import WORKS, Outcome, OutcomeKind
from megatron.config.registry import Key, keys
from megatron.config.run_config import RunConfig

__all__ = ["check_launch", "judge"]


def check_launch(config: RunConfig) -> list[str]:
    """Check that training with ``config`` does what its keys say.

    Returns:
        One notice per written key that has no effect, or that only picks a kernel.

    Raises:
        ConfigError: keys are known but not supported yet, or training lacks something.
    """
    flat = config.flat()
    problems, notices = [*_missing_for_training(config), *_contradictions(config)], []
    problems += _missing_packages(config)
    for name, entry in keys().items():
        outcome = judge(entry, flat)
        if outcome.kind is OutcomeKind.REFUSED:
            problems.append(_refusal(config, entry, outcome))
        elif name not in config.written or flat[name] == entry.default:
            continue
        elif outcome.kind is OutcomeKind.NO_EFFECT:
            notices.append(f"{config.say(name)} has no effect here: {outcome.text}")
        elif outcome.kind is OutcomeKind.SAME_NUMBERS:
            notices.append(f"{config.say(name)} leaves the numbers alone: {outcome.text}")
    notices += _overwritten(config)
    notices += _elastic_batch(config)
    if problems:
        raise ConfigError(*problems)
    return notices


def judge(entry: Key, flat: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a key's value among all values.

    A rule also sees the default, which may itself not be supported; a fixed outcome speaks of
    other values only.
    """
    value = flat[entry.name]
    outcome = entry.declaration.outcome
    if value is None:
        return WORKS
    if isinstance(outcome, Outcome):
        return WORKS if value == entry.default else outcome
    return outcome(value, flat)


def _refusal(config: RunConfig, entry: Key, outcome: Outcome) -> str:
    where = ""
    if entry.name in config.origins:
        where = f"{config.origins[entry.name].origin}: "
    whose = "" if entry.is_ours else "known to NeoX, "
    value = _short(config.get(entry.name))
    return f"{where}{whose}not supported here yet: {entry.name}={value} ({outcome.text})"


def _overwritten(config: RunConfig) -> list[str]:
    """Notices for written keys that loading always works out itself, to another value."""
    notices = []
    for name, item in config.origins.items():
        if not keys()[name].declaration.is_derived or item.value is None:
            continue
        value = config.get(name)
        if value is not None and value != item.value:
            notices.append(
                f"{item.spelling}={_short(item.value)} ({item.origin}) has no effect here: "
                f"it is always worked out, as {_short(value)}"
            )
    return notices


def _elastic_batch(config: RunConfig) -> list[str]:
    if not config.ledger.elastic_batch:
        return []
    geometry = config.geometry
    text = (
        f"elastic_batch: {geometry.global_batch_size} samples per step = micro batch "
        f"{geometry.micro_batch_size} x gradient accumulation "
        f"{geometry.gradient_accumulation_steps} x {geometry.data_parallel_size} data-parallel "
        "ranks"
    )
    written = config.origins.get("train_micro_batch_size_per_gpu")
    if written is not None:
        text += f"; a rank takes at most {written.value} at a time ({written.origin})"
    written = config.origins.get("gradient_accumulation_steps")
    if written is not None and written.value not in (None, geometry.gradient_accumulation_steps):
        text += f"; {written.spelling}={written.value} ({written.origin}) has no effect"
    return [text]


def _missing_for_training(config: RunConfig) -> list[str]:
    problems = []
    if config.deepspeed.optimizer is None:
        problems.append(
            'training needs an optimizer: optimizer: {"type": "Adam", "params": {"lr": 0.0006}}'
        )
    elif "weight_decay" in config.deepspeed.optimizer["params"]:
        problems.append(
            f"{config.origins['optimizer'].origin if 'optimizer' in config.origins else 'config'}: "
            "write weight_decay as a key of its own, not inside optimizer.params"
        )
    training = config.training
    if training.train_iters is None and training.train_epochs is None:
        problems.append("how long? set train_iters (steps), or train_epochs")
    if training.data_path is None and not training.train_data_paths:
        problems.append("which data? set data_path, or train_, valid_ and test_data_paths")
    if config.model.seq_length is None:
        problems.append("seq_length is missing: how many tokens does the model see at a time?")
    stages, layers = config.topology.pipeline_parallel_size, config.model.num_layers
    if layers is not None and stages > layers:
        problems.append(
            f"{config.say('pipe_parallel_size')} stages can't share {config.say('num_layers')}: "
            "every stage needs a layer"
        )
    return problems


def _missing_packages(config: RunConfig) -> list[str]:
    """Packages of optional parts; better missed now than at the first save."""
    if config.training.s3_path is None or find_spec("s3fs") is not None:
        return []
    return [
        f"{config.say('s3_path')} needs the package s3fs, which is not installed: "
        "pip install -r requirements/requirements-s3.txt"
    ]


def _contradictions(config: RunConfig) -> list[str]:
    """Problems that would only show while training runs."""
    problems = []
    training = config.training
    if training.train_iters is not None and training.train_epochs is not None:
        problems.append(
            f"{config.say('train_iters')} and {config.say('train_epochs')} both say how long to "
            "train; keep one"
        )
    problems += _labels_problems(config)
    factor = training.checkpoint_factor
    if training.save is None or factor is None:
        return problems
    if training.checkpoint_scale == "log" and factor <= 1:
        problems.append(
            f"{config.say('checkpoint_factor')} must be above 1 with checkpoint_scale log: saves "
            "are at its powers"
        )
    if training.checkpoint_scale == "linear" and factor != int(factor):
        problems.append(
            f"{config.say('checkpoint_factor')} must be a whole number of steps with "
            "checkpoint_scale linear"
        )
    return problems


def _labels_problems(config: RunConfig) -> list[str]:
    names = [f"{split}_label_data_paths" for split in ("train", "valid", "test")]
    given = [name for name in names if config.get(name)]
    if len(given) in (0, len(names)):
        return []
    missing = [name for name in names if name not in given]
    return [
        f"{' and '.join(given)} given without {' and '.join(missing)}; evaluations learn and leave "
        "out what training does: give label data for all three, or for none"
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
