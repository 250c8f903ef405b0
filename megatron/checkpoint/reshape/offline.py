"""One checkpoint directory rewritten for another topology, file by file.

    1  the source's digests are checked
    2  every file of the new topology is written into a hidden directory beside the destination;
       tensors are read from the mapped source while they are written
    3  ledger.json, manifest.json, latest; then the directory gets its name

Memory is bounded by the largest tensor, not by the model. A kill leaves the source as it is and a
hidden directory that says what it is.
"""

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.base.atomic_files import fsync_directory, write_atomically
from megatron.base.errors import CheckpointError
from megatron.base.file_digests import digest_file
from megatron.checkpoint.new_directory import new_directory
from megatron.checkpoint.parameter_state import ParameterStates, open_parameter_states
from megatron.checkpoint.reshape.for_neox import NeoxWeights
from megatron.checkpoint.reshape.mapped_pages import MappedPages
from megatron.checkpoint.reshape.optimizer_files import (
    StateSlice,
    StoredFormat,
    parameter_shapes,
    partitioned_state,
    replicated_state,
    stored_format,
)
from megatron.checkpoint.reshape.plan import LayerShapes, Stage, plan_stages
from megatron.checkpoint.reshape.streamed_file import StreamedTensor, write_streamed_file
from megatron.checkpoint.stored import (
    LEDGER_FILE,
    StoredCheckpoint,
    layer_file,
    model_states_file,
    zero_file,
)
from megatron.checkpoint.structure import checksum_problems, structural_problems, torch_files
from megatron.checkpoint.weights import rank_part, stored_shape
from megatron.config.topology import Topology
from megatron.ledger.ledger_file import (
    CheckpointPlace,
    Ledger,
    ModelPart,
    read_ledger,
    write_ledger,
)
from megatron.ledger.manifest import (
    Manifest,
    StoredFile,
    digest_problems,
    quick_problems,
    read_manifest,
    write_manifest,
)
from megatron.ledger.readers import reading
from megatron.ledger.run_directory import read_latest, step_of, write_latest
from megatron.model.layer_plan import layer_plan
from megatron.model.parallel_layers import TensorParallel
from megatron.model.settings import ModelSettings

__all__ = ["ReshapeSettings", "Reshaped", "find_checkpoint", "reshape_checkpoint"]

_RANDOM_STATES = (
    "random_rng_state",
    "np_rng_state",
    "torch_rng_state",
    "cuda_rng_state",
    "rng_tracker_states",
)
# Results of a forward pass on the writer's ranks.
_FORWARD_CHECKS = ("checkpoint_validation_logits", "forward_check")
_FIRST_SEQUENCE = 1  # the destination is a directory of its own


@dataclass(frozen=True, kw_only=True)
class ReshapeSettings:
    """What is written."""

    model: ModelSettings  # with the source's pinned facts
    topology: Topology
    partition_method: str = "type:transformer|mlp"  # NeoX's pipe_partition_method
    for_neox: NeoxWeights | None = None  # weights alone, as NeoX itself reads them


@dataclass(frozen=True)
class Reshaped:
    """What was written."""

    checkpoint: Path
    num_files: int
    num_bytes: int
    notices: tuple[str, ...]  # what a user should know


def find_checkpoint(source: Path) -> Path:
    """Return the ``global_stepN`` directory that ``source`` is, or whose name ``latest`` holds.

    Raises:
        CheckpointError: it is neither.
    """
    if step_of(source.name) is not None:
        if not source.is_dir():
            raise CheckpointError(f"{source} is not a directory")
        return source
    step = read_latest(source) if source.is_dir() else None
    if step is None:
        raise CheckpointError(
            f"{source} is no global_stepN and holds no `latest`; name a checkpoint's directory"
        )
    return source / f"global_step{step}"


def reshape_checkpoint(source: Path, destination: Path, settings: ReshapeSettings) -> Reshaped:
    """Write the checkpoint ``source`` for another topology into a new directory.

    Args:
        source: a ``global_stepN``, ours or NeoX's.
        destination: becomes a directory like a ``save``, with ``global_stepN`` and ``latest``.
        settings: the topology, and the model.

    Raises:
        CheckpointError: the source is damaged or cannot be read, or the destination exists or
            cannot be written; nothing is left behind.
        ConfigError: the model cannot be divided so.
    """
    settings.model.require_divisible(settings.topology.tensor_parallel_size)
    with new_directory(destination, "reshape") as temporary, reading(source):
        return _write(source, temporary, destination, settings)


def _write(source: Path, temporary: Path, destination: Path, settings: ReshapeSettings) -> Reshaped:
    _require_intact(source, needs_optimizer=settings.for_neox is None)
    writer = _Writer(
        StoredCheckpoint(source, is_verified=True),
        temporary / f"global_step{_step(source)}",
        settings,
    )
    writer.directory.mkdir()
    writer.write_tensors()
    _copy_configs(source, writer.directory)
    ledger = _write_ledger(source, writer.directory, settings)
    files = dict(writer.files)
    for path in sorted(writer.directory.rglob("*")):
        name = path.relative_to(writer.directory).as_posix()
        if path.is_file() and name not in files:
            files[name] = StoredFile(path.stat().st_size, digest_file(path))
    span = ledger.spans[-1] if ledger is not None and ledger.spans else None
    write_manifest(
        writer.directory,
        Manifest(
            sequence=_FIRST_SEQUENCE,
            step=_step(source),
            run_id=None if ledger is None else ledger.run_id,
            attempt=None if span is None else span.attempt,
            parent=None,
            files=files,
        ),
    )
    fsync_directory(writer.directory)
    write_latest(temporary, _step(source))
    return Reshaped(
        destination / writer.directory.name,
        len(files),
        sum(file.size for file in files.values()),
        tuple(writer.notices),
    )


def _require_intact(source: Path, *, needs_optimizer: bool) -> None:
    """Check that every file holds what was written; every byte is read once.

    Without a manifest (NeoX's) that is known from the checksums inside of the files.
    """
    manifest = read_manifest(source)
    if manifest is None:
        problems = structural_problems(source, needs_optimizer=needs_optimizer)
        problems = problems or checksum_problems(source, sorted(torch_files(source)))
    else:
        problems = quick_problems(source, manifest)
        problems = problems or digest_problems(source, manifest, sorted(manifest.files))
    if problems:
        raise CheckpointError(
            f"{source} is damaged, so nothing was written: {'; '.join(problems)}. Take another "
            "checkpoint"
        )


def _step(source: Path) -> int:
    step = step_of(source.name)
    if step is None:
        raise CheckpointError(f"{source} is not called global_stepN")
    return step


def _copy_configs(source: Path, directory: Path) -> None:
    if (source / "configs").is_dir():
        target = directory / "configs"
        target.mkdir()
        for path in sorted((source / "configs").iterdir()):
            if path.is_file() and not path.is_symlink():
                write_atomically(target / path.name, path.read_bytes())


def _write_ledger(source: Path, directory: Path, settings: ReshapeSettings) -> Ledger | None:
    """Carry the record over: what was consumed is the same, wherever the tensors lie."""
    if settings.for_neox is not None:
        return None  # NeoX's arguments say all that a reader needs
    model = ModelPart(
        padded_vocab_size=settings.model.padded_vocab_size,
        tp_bias_multiplicity=settings.model.tp_bias_multiplicity,
        tensor_parallel_size=settings.topology.tensor_parallel_size,
    )
    ledger = read_ledger(source)
    if ledger is None:
        facts = {"model": asdict(model)}
        write_atomically(directory / LEDGER_FILE, json.dumps(facts, indent=2) + "\n")
        return None
    place = CheckpointPlace(sequence=_FIRST_SEQUENCE, parent=None)
    ledger = dataclasses.replace(ledger, model=model, checkpoint=place)
    write_ledger(directory, ledger)
    return ledger


class _Writer:
    """Writes the torch files of one checkpoint."""

    def __init__(
        self, stored: StoredCheckpoint, directory: Path, settings: ReshapeSettings
    ) -> None:
        if stored.is_scattered:
            raise CheckpointError(
                f"{stored.directory} was written by ZeRO stage 3, which scatters weights and state "
                "over the ranks; it can be resumed at its own topology only"
            )
        self.stored = stored
        self.directory = directory
        self.settings = settings
        self.files: dict[str, StoredFile] = {}
        self.notices: list[str] = []
        self._pages = MappedPages(stored.directory)
        self._size = settings.topology.tensor_parallel_size
        self._shapes = _layer_shapes(stored, settings.model, self._size)
        self._stages = plan_stages(
            layer_plan(settings.model, TensorParallel(), seed=0),
            self._shapes,
            settings.topology,
            partition_method=settings.partition_method,
        )
        self._states, self._written = self._open_state()
        self._metadata = self._common_metadata()

    def write_tensors(self) -> None:
        """Write every rank's files."""
        topology = self.settings.topology
        for stage_number, stage in enumerate(self._stages):
            for tensor_rank in range(self._size):
                model_rank = stage_number * self._size + tensor_rank
                self._write_model_rank(stage, tensor_rank, model_rank)
                if self._written is None or not self._written.kind.is_partitioned:
                    continue
                for data_rank in range(topology.data_parallel_size):
                    self._write_partition(stage, tensor_rank, model_rank, data_rank)

    def _open_state(self) -> tuple[ParameterStates | None, StoredFormat | None]:
        if self.settings.for_neox is not None:
            self.notices += self.settings.for_neox.notices(self.settings.model)
            return None, None
        if not self.stored.model_ranks:
            self.notices.append("the source holds weights alone, and so does what was written")
            return None, None
        states = open_parameter_states(self.stored, self.settings.model)
        self.notices += states.notices
        written = stored_format(self.stored).at(
            uses_pipeline_engine=self.settings.topology.uses_pipeline_engine,
            is_bf16=states.weight_dtype == torch.bfloat16,
            step=states.step,
        )
        return states, written

    def _common_metadata(self) -> dict[str, Any] | None:
        """Return what all model-states files have in common; None: there are none to write."""
        if not self.stored.model_ranks:
            return None
        topology = self.settings.topology
        metadata = dict(self.stored.model_states(self.stored.model_ranks[0]))
        had_random_states = [metadata.pop(key, None) is not None for key in _RANDOM_STATES]
        if any(had_random_states):
            self.notices.append(
                "random states are left out: they belong to the ranks of another topology. Dropout "
                "goes on from the run's seed, the order of samples is not affected"
            )
        for key in _FORWARD_CHECKS:
            metadata.pop(key, None)
        arguments = {**metadata.get("args", {}), "model_parallel_size": self._size}
        if self.settings.for_neox is not None:
            arguments["padded_vocab_size"] = self.settings.for_neox.padded_vocab_size
        stages = len(self._stages)
        metadata.update(
            args=arguments,
            module=None,
            optimizer=None,
            buffer_names=[],
            shared_params=None,
            param_shapes=None,
            ds_config=self._batch_settings(metadata),
            dp_world_size=topology.data_parallel_size,
            mp_world_size=stages * self._size,
            checkpoint_parallel_dimensions={"pp_degree": stages, "tp_degree": self._size},
            reshaped_from={
                "dp_world_size": metadata.get("dp_world_size"),
                "mp_world_size": metadata.get("mp_world_size"),
                "model_parallel_size": self.stored.tensor_parallel_size,
            },
        )
        return metadata

    def _batch_settings(self, metadata: Mapping[str, Any]) -> Any:
        """Return ``ds_config`` with the writer's global batch divided for the new topology.

        The batch of a checkpoint without a ledger is worked out from these numbers.
        """
        config = metadata.get("ds_config")
        if not isinstance(config, Mapping):
            return config
        micro = config.get("train_micro_batch_size_per_gpu")
        steps = config.get("gradient_accumulation_steps")
        ranks = metadata.get("dp_world_size")
        if not all(isinstance(number, int) for number in (micro, steps, ranks)):
            return config
        batch = micro * steps * ranks
        size = self.settings.topology.data_parallel_size
        if batch % size:
            if read_ledger(self.stored.directory) is None and self.settings.for_neox is None:
                raise CheckpointError(
                    f"{self.stored.directory} was trained with {batch} samples a step, which "
                    f"{size} data-parallel ranks cannot share evenly, and without a ledger the "
                    "position in the data follows from that number; choose --dp so that it divides"
                )
            return config
        micro = max(n for n in range(1, micro + 1) if micro % n == 0 and batch % (n * size) == 0)
        return {
            **config,
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": batch // (micro * size),
        }

    def _write_model_rank(self, stage: Stage, tensor_rank: int, model_rank: int) -> None:
        weights = {
            layer: OrderedDict(
                (name, self._weight(layer, name, shape, tensor_rank))
                for name, shape in self._shapes[layer].items()
            )
            for layer in stage.layers
        }
        metadata = None if self._metadata is None else dict(self._metadata)
        if self.settings.topology.uses_pipeline_engine:
            for layer, tensors in weights.items():
                self._write_file(layer_file(layer, tensor_rank), tensors)
        else:
            metadata = metadata or {}
            metadata["module"] = OrderedDict(
                (f"sequential.{layer}.{name}", tensor)
                for layer, tensors in weights.items()
                for name, tensor in tensors.items()
            )
        if metadata is None:
            return
        if self._states is not None and self._written is not None:
            state = self._slice(stage, tensor_rank)
            if self._written.zero_stage > 0:
                metadata.update(param_shapes=parameter_shapes(state), shared_params={})
            if not self._written.kind.is_partitioned:
                metadata["optimizer"] = replicated_state(state, self._written)
        self._write_file(model_states_file(model_rank), metadata)

    def _write_partition(
        self, stage: Stage, tensor_rank: int, model_rank: int, data_rank: int
    ) -> None:
        assert self._states is not None  # noqa: S101
        assert self._written is not None  # noqa: S101
        content = {
            "optimizer_state_dict": partitioned_state(
                self._slice(stage, tensor_rank),
                self._written,
                num_partitions=self.settings.topology.data_parallel_size,
                data_rank=data_rank,
            ),
            "ds_config": None if self._metadata is None else self._metadata["ds_config"],
            "ds_version": None if self._metadata is None else self._metadata.get("ds_version"),
        }
        is_bf16 = self._states.weight_dtype == torch.bfloat16
        self._write_file(zero_file(data_rank, model_rank, bf16=is_bf16), content)

    def _slice(self, stage: Stage, tensor_rank: int) -> StateSlice:
        assert self._states is not None  # noqa: S101
        return StateSlice(self._states, stage, self._size, tensor_rank, self._pages.count)

    def _weight(
        self, layer: int, name: str, shape: Sequence[int], tensor_rank: int
    ) -> StreamedTensor:
        dtype = self.stored.weights(layer, 0)[1][name].dtype
        for_neox = self.settings.for_neox
        model = self.settings.model
        if for_neox is not None:
            shape = for_neox.shape(name, shape)

        def pieces() -> Iterator[torch.Tensor]:
            parts = [
                self.stored.weights(layer, rank)[1][name]
                for rank in range(self.stored.tensor_parallel_size)
            ]
            if for_neox is not None:
                part = for_neox.part(name, parts, rank=tensor_rank, settings=model)
            else:
                part = rank_part(name, parts, size=self._size, rank=tensor_rank, settings=model)
            yield part
            self._pages.count(part)

        return StreamedTensor(tuple(shape), dtype, pieces)

    def _write_file(self, name: str, content: Any) -> None:
        self.files[name] = write_streamed_file(content, self.directory / name)
        self._pages.release()


def _layer_shapes(stored: StoredCheckpoint, settings: ModelSettings, size: int) -> LayerShapes:
    """Return the shapes of every layer's tensors at tensor-parallel ``size``.

    Raises:
        CheckpointError: a tensor rank's file lacks a tensor, or holds one of another shape.
    """
    shapes: dict[int, dict[str, tuple[int, ...]]] = {}
    for layer in stored.layer_numbers:
        path, tensors = stored.weights(layer, 0)
        for rank in range(stored.tensor_parallel_size):
            path, others = stored.weights(layer, rank)
            if sorted(others) != sorted(tensors):
                different = ", ".join(sorted(set(others) ^ set(tensors)))
                raise CheckpointError(
                    f"{path}: layer {layer} differs from that of tensor rank 0: {different}; its "
                    "files come from different saves"
                )
            for name, tensor in others.items():
                local = tuple(tensors[name].shape)
                expected = stored_shape(name, local, settings, stored.tensor_parallel_size)
                if tuple(tensor.shape) != expected:
                    raise CheckpointError(
                        f"{path}: {name} of layer {layer} has shape {tuple(tensor.shape)}, but the "
                        f"model in configs/ needs {expected} on each of "
                        f"{stored.tensor_parallel_size} tensor ranks"
                    )
        shapes[layer] = {
            name: stored_shape(name, tuple(tensor.shape), settings, size)
            for name, tensor in tensors.items()
        }
    return shapes
