"""Reading a checkpoint: everything is opened and checked on every rank before anything changes.

DeepSpeed's own loader serves ZeRO 3 only: it loads a stale or missing part without a word, and a
damaged file on one rank leaves the others waiting (measured: platform facts, §6).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import nn

from megatron.base.errors import CheckpointError
from megatron.checkpoint.agreement import Gather, all_or_none
from megatron.checkpoint.compatibility import (
    WEIGHTS_ALONE,
    LoadSettings,
    model_rank,
    require_same_arguments,
    require_same_parameters,
    topology_difference,
)
from megatron.checkpoint.engine_optimizer import (
    adapt_engine_state,
    is_partitioned,
    layout_difference,
    load_engine_state,
    require_matching_masters,
    zero_file_of,
)
from megatron.checkpoint.resharding import Resharding, apply_resharding, prepare_resharding
from megatron.checkpoint.rng import require_rng_states, restore_rng_states
from megatron.checkpoint.safe_torch import read_torch_file
from megatron.checkpoint.stored import StoredCheckpoint, model_states_file
from megatron.checkpoint.stored_optimizer import gradient_multiple_notice, gradient_multiple_of
from megatron.checkpoint.weights import LayerWeights, copy_weights, read_weights

__all__ = ["RESHAPED_FROM", "LoadSettings", "LoadedState", "load_checkpoint", "load_weights"]


RESHAPED_FROM = "reshaped_from"
"""In a model-states file: another topology wrote what the files were made from."""


@dataclass(frozen=True)
class LoadedState:
    """Where a run goes on."""

    iteration: int  # steps the loaded model has been trained for
    notices: tuple[str, ...]  # what a user should know, the same on every rank
    reseeds_rng: bool = False
    """The random states were wanted and are another topology's: draw new ones (design §2, E4)."""


@dataclass(frozen=True)
class _Prepared:
    """Everything read and checked; nothing of it applied yet."""

    iteration: int
    metadata: Mapping[str, Any]  # of a model-states file; empty if it isn't needed
    weights: LayerWeights | None
    optimizer: dict[str, Any] | None  # as this very optimizer saved it
    resharding: Resharding | None  # in place of weights and optimizer
    rng_source: str | None  # the file the random states come from, None: they are left alone
    reseeds_rng: bool
    notices: tuple[str, ...]


def load_weights(
    module: nn.Module, directory: Path, settings: LoadSettings, *, gather: Gather
) -> None:
    """Fill ``module`` with the weights of a checkpoint written at any TP and PP.

    Call it before an engine wraps the module: DeepSpeed then makes its fp32 copies from them.

    Args:
        module: this rank's pipeline stage, or the sequential model.
        directory: a ``global_stepN``.
        settings: what is expected of it.
        gather: collects a value of every rank, outside of the training's process groups.

    Raises:
        CheckpointError: a file or tensor is missing or doesn't fit, on any rank; the module is
            then unchanged everywhere.
    """

    def prepare() -> LayerWeights:
        stored = settings.open(directory)
        require_same_arguments(stored, settings, but=("model_parallel_size",))
        return _read_weights(stored, module, settings)

    copy_weights(module, all_or_none(prepare, gather))


def load_checkpoint(
    engine: Any,
    directory: Path,
    settings: LoadSettings,
    *,
    gather: Gather,
    restores_weights: bool = True,
    restores_optimizer: bool = True,
    restores_rng: bool = True,
) -> LoadedState:
    """Restore ``engine`` from a checkpoint and return where the run goes on.

    Args:
        engine: DeepSpeed's, freshly initialised.
        directory: a ``global_stepN``, NeoX's or ours.
        settings: what is expected of it.
        gather: collects a value of every rank, outside of the training's process groups.
        restores_weights: False if :func:`load_weights` has filled the module already.
        restores_optimizer: also restore optimizer, schedule and step counters. If this launch is
            divided in another way than the writer, or trains in another precision or ZeRO stage,
            masters and moments are resharded, exactly.
        restores_rng: also restore the random states, where the topology is the writer's.

    Raises:
        CheckpointError: anything is missing, damaged or doesn't fit, on any rank, or the
            learning-rate schedule is another one; nothing has been changed then on any of them.
    """
    if restores_optimizer and _is_scattered(engine):
        return _load_scattered(engine, directory, settings, gather, restores_rng)

    prepared = all_or_none(
        lambda: _prepare(
            engine,
            settings.open(directory),
            settings,
            restores_weights=restores_weights,
            restores_optimizer=restores_optimizer,
            restores_rng=restores_rng,
        ),
        gather,
    )
    if restores_optimizer:
        schedule = prepared.metadata["lr_scheduler"]
        all_or_none(lambda: engine.lr_scheduler.load_state_dict(schedule), gather)
    if prepared.weights is not None:
        copy_weights(engine.module, prepared.weights)
    if restores_optimizer:
        all_or_none(lambda: _apply_optimizer(engine, prepared, settings), gather)
        _apply_counters(engine, prepared.metadata)
        # The optimizer's state brought the rate it was saved with.
        engine.lr_scheduler.apply()
        all_or_none(lambda: require_matching_masters(engine, directory), gather)
    elif prepared.weights is not None and hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()
    if prepared.rng_source is not None:
        restore_rng_states(prepared.metadata, source=prepared.rng_source)
    return LoadedState(prepared.iteration, prepared.notices, prepared.reseeds_rng)


def _prepare(
    engine: Any,
    stored: StoredCheckpoint,
    settings: LoadSettings,
    *,
    restores_weights: bool,
    restores_optimizer: bool,
    restores_rng: bool,
) -> _Prepared:
    difference = topology_difference(stored, settings.topology)
    require_same_arguments(stored, settings, but=("model_parallel_size",) if difference else ())
    metadata: Mapping[str, Any] = {}
    rng_source = None
    if stored.model_ranks:
        model_file = stored.model_ranks[0] if difference else model_rank(settings)
        metadata = stored.model_states(model_file)
    notices = []
    seeds_anew = difference or (RESHAPED_FROM in metadata and "it was reshaped by a tool")
    if restores_rng and seeds_anew:
        notices.append(
            f"random states are not restored: {seeds_anew}; dropout's are seeded from (seed, step, "
            "stage, tensor rank), the order of samples is not affected"
        )
    elif restores_rng:
        rng_source = str(stored.directory / model_states_file(model_rank(settings)))
        require_rng_states(metadata, source=rng_source)
    optimizer, resharding = None, None
    if restores_optimizer:
        other = difference or layout_difference(engine, stored, metadata, settings)
        if other is None:
            optimizer, found = _read_optimizer(engine, stored, metadata, settings)
        else:
            resharding = prepare_resharding(engine, stored, settings)
            found = (f"the optimizer's state is resharded, exactly: {other}", *resharding.notices)
        notices += found
    reads_weights = restores_weights and resharding is None
    return _Prepared(
        iteration=stored.iteration,
        metadata=metadata,
        weights=_read_weights(stored, engine.module, settings) if reads_weights else None,
        optimizer=optimizer,
        resharding=resharding,
        rng_source=rng_source,
        reseeds_rng=restores_rng and rng_source is None,
        notices=tuple(notices),
    )


def _read_weights(
    stored: StoredCheckpoint, module: nn.Module, settings: LoadSettings
) -> LayerWeights:
    return read_weights(
        stored,
        module,
        settings=settings.model,
        tensor_parallel_size=settings.topology.tensor_parallel_size,
        tensor_rank=settings.tensor_rank,
    )


def _read_optimizer(
    engine: Any, stored: StoredCheckpoint, metadata: Mapping[str, Any], settings: LoadSettings
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return this rank's state as ``engine.optimizer`` loads it, and notices."""
    name = model_states_file(model_rank(settings))
    state, ds_config = metadata.get("optimizer"), metadata.get("ds_config")
    if is_partitioned(engine):
        name = zero_file_of(engine, settings)
        content = stored.optimizer_states(name)
        state, ds_config = content.get("optimizer_state_dict"), content.get("ds_config")
        require_same_parameters(engine, metadata, source=str(stored.directory / name))
    source = str(stored.directory / name)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{source} holds no optimizer state; {WEIGHTS_ALONE}")
    multiple = gradient_multiple_of(stored, ds_config)
    notices = () if multiple == 1 else (gradient_multiple_notice(multiple),)
    adapted, found = adapt_engine_state(engine, state, gradient_multiple=multiple, source=source)
    return adapted, (*notices, *found)


def _apply_optimizer(engine: Any, prepared: _Prepared, settings: LoadSettings) -> None:
    if prepared.resharding is not None:
        apply_resharding(engine, prepared.resharding)
    elif prepared.optimizer is not None:
        load_engine_state(engine, prepared.optimizer, settings)


def _apply_counters(engine: Any, metadata: Mapping[str, Any]) -> None:
    engine.global_steps = metadata["global_steps"]
    engine.global_samples = metadata.get(
        "global_samples", engine.global_steps * engine.train_batch_size()
    )
    engine.skipped_steps = metadata["skipped_steps"]


def _load_scattered(
    engine: Any, directory: Path, settings: LoadSettings, gather: Gather, restores_rng: bool
) -> LoadedState:
    """Resume a ZeRO 3 run through DeepSpeed's loader, once every rank can read its files."""
    if engine.load_universal_checkpoint():
        raise CheckpointError(
            "checkpoint.load_universal is not supported: DeepSpeed would read its files without "
            "our checks; remove the key"
        )
    place = settings.topology.coordinates(settings.rank)

    def prepare() -> tuple[int, Mapping[str, Any]]:
        stored = settings.open(directory)
        difference = topology_difference(stored, settings.topology)
        if difference is not None or not stored.is_scattered:
            difference = difference or "it was not written by ZeRO stage 3"
            raise CheckpointError(
                f"{directory}: {difference}; ZeRO stage 3 resumes at its own topology and stage "
                f"only; {WEIGHTS_ALONE}"
            )
        require_same_arguments(stored, settings)
        stored.optimizer_states(zero_file_of(engine, settings))
        metadata = stored.model_states(model_rank(settings), place.data_parallel_rank)
        if restores_rng:
            require_rng_states(metadata, source=str(directory))
        return stored.iteration, metadata

    iteration, metadata = all_or_none(prepare, gather)
    original, engine.checkpoint_engine = engine.checkpoint_engine, _FileReader()
    try:
        engine.load_checkpoint(str(directory.parent), tag=directory.name)
    finally:
        engine.checkpoint_engine = original
    if restores_rng:
        restore_rng_states(metadata, source=str(directory))
    return LoadedState(iteration, ())


class _FileReader(TorchCheckpointEngine):
    """DeepSpeed's loader, reading through our restricted unpickler."""

    def create(self, info: CheckpointCommitInfo) -> None:
        raise NotImplementedError("this engine reads only")

    def load(self, path: str, map_location: Any = None) -> Any:
        return read_torch_file(Path(path))


def _is_scattered(engine: Any) -> bool:
    return bool(engine.zero_optimization_partition_weights())
