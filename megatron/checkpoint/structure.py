"""Whether the files of a checkpoint make one whole: any checkpoint, NeoX's without a manifest too.

Looked at are names, and what each file says besides the values of its tensors: one file at a time,
a millisecond each, whatever their size. Damaged bytes inside a tensor are for checksums
(:func:`checksum_problems`, or a manifest's digests) to find, values that are no numbers for
``stored_values``. Nothing here imports torch.
"""

import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron.base.errors import CheckpointError
from megatron.base.torch_metadata import inspect_torch_file, require_checksums
from megatron.checkpoint.checkpoint_files import TorchFiles, sorted_files
from megatron.checkpoint.optimizer_structure import optimizer_problems
from megatron.checkpoint.stored_headers import (
    Metadata,
    OptimizerPart,
    Place,
    Tensor,
    read_metadata,
    read_optimizer_part,
    read_tensors,
)
from megatron.ledger.ledger_file import Ledger, read_ledger
from megatron.ledger.run_directory import step_of

__all__ = [
    "Structure",
    "checksum_problems",
    "examine",
    "structural_problems",
    "torch_files",
]

T = TypeVar("T")
_LISTED = 4  # of missing files, in one message


@dataclass
class Structure:
    """What a checkpoint consists of, and what is wrong with that."""

    checkpoint: Path
    files: TorchFiles
    sizes: Mapping[str, int]  # of the torch files, bytes
    metadata: dict[int, Metadata] = field(default_factory=dict)  # by model rank
    tensors: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)
    """By layer and tensor rank."""
    optimizer: dict[tuple[int, int], OptimizerPart] = field(default_factory=dict)
    """By data-parallel and model rank."""
    ledger: Ledger | None = None
    problems: list[str] = field(default_factory=list)
    """Each names its file first."""
    notes: list[str] = field(default_factory=list)
    """What a user should know, though it isn't wrong."""

    @property
    def first(self) -> Metadata | None:
        """The metadata of the first rank whose file can be read."""
        return self.metadata[min(self.metadata)] if self.metadata else None

    @property
    def step(self) -> int | None:
        """The step the files were saved at."""
        first = self.first
        return first.iteration if first is not None else step_of(self.checkpoint.name)

    @property
    def is_pipeline(self) -> bool:
        """Whether weights stand in layer files."""
        first = self.first
        return bool(self.files.layers) if first is None else first.weights is None

    @property
    def tensor_parallel_size(self) -> int:
        """Parts of every divided tensor."""
        told = self.first.arguments.get("model_parallel_size") if self.first is not None else None
        if self.ledger is not None:
            told = self.ledger.model.tensor_parallel_size
        if type(told) is int and told > 0:
            return told
        return 1 + max((rank for _, rank in (self.files.layers or self.tensors)), default=0)

    @property
    def model_ranks(self) -> int:
        """Pipeline stages times tensor ranks."""
        told = self.first.model_ranks if self.first is not None else None
        ranks = {*self.files.model_states, *(rank for _, rank in self.files.scattered)}
        return told or 1 + max(ranks, default=0)

    @property
    def data_parallel_size(self) -> int:
        """Parts of the optimizer state of every model rank."""
        told = self.first.data_parallel_size if self.first is not None else None
        return told or 1 + max((rank for rank, _ in self.files.optimizer), default=0)

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers whose weights are there, ascending."""
        return sorted({layer for layer, _ in self.tensors})


def structural_problems(checkpoint: Path, *, needs_optimizer: bool = True) -> list[str]:
    """Return what is wrong with the files of a checkpoint; each problem names its file first.

    Every file of every layer and rank is there and holds data alone; tensors have the shapes that
    the stored arguments, the optimizer and the other tensor ranks give them; all files are of one
    step, the one that the directory is called after. No tensor is read.

    Args:
        checkpoint: a ``global_stepN``, NeoX's or ours.
        needs_optimizer: optimizer state belongs to it; False: weights are all that is wanted.
    """
    return examine(checkpoint, needs_optimizer=needs_optimizer).problems


def torch_files(checkpoint: Path) -> dict[str, int]:
    """Return the size of every torch file in a checkpoint, by name.

    Raises:
        CheckpointError: it is no directory, or cannot be listed.
    """
    try:
        with os.scandir(checkpoint) as entries:
            return {
                entry.name: entry.stat(follow_symlinks=False).st_size
                for entry in entries
                if entry.name.endswith(".pt")
            }
    except OSError as error:
        raise CheckpointError(f"{checkpoint} cannot be listed: {error.strerror}") from error


def checksum_problems(checkpoint: Path, names: Iterable[str]) -> list[str]:
    """Read the torch files called ``names`` once, and return those whose checksums don't match.

    Files of a torch before 1.6 have none; only their sizes are known to be right.
    """
    problems = []
    for name in names:
        try:
            require_checksums(inspect_torch_file(checkpoint / name))
        except CheckpointError as error:
            problems.append(_relative(error, checkpoint))
    return problems


def examine(checkpoint: Path, *, needs_optimizer: bool = True) -> Structure:
    """Read names and headers of a checkpoint; see :func:`structural_problems`."""
    try:
        sizes = torch_files(checkpoint)
    except CheckpointError as error:
        return Structure(checkpoint, TorchFiles(), {}, problems=[str(error)])
    structure = Structure(checkpoint, sorted_files(sizes), sizes)
    files = structure.files
    if not (files.layers or files.model_states or files.scattered):
        structure.problems.append("no layer_*.pt and no mp_rank_*.pt: it is not a checkpoint")
        return structure
    structure.problems += _irregular(checkpoint)
    _read(structure, needs_optimizer)
    problems = structure.problems
    problems += _missing_model_files(structure)
    problems += _other_steps(structure)
    problems += _shape_problems(structure)
    if needs_optimizer:
        problems += optimizer_problems(
            files=files,
            metadata=structure.metadata,
            parts=structure.optimizer,
            tensors=structure.tensors,
            sizes=(structure.model_ranks, structure.data_parallel_size),
            tensor_parallel_size=structure.tensor_parallel_size,
        )
    structure.notes += [f"{name}: nothing reads a file of this name" for name in files.others]
    return structure


def _read(structure: Structure, needs_optimizer: bool) -> None:
    """Read every header, and keep what each file says as long as it can be read."""
    path, files, problems = structure.checkpoint, structure.files, structure.problems

    def read(name: str, reader: Callable[[Path], T]) -> T | None:
        try:
            return reader(path / name)
        except CheckpointError as error:
            problems.append(_relative(error, path))
        except (TypeError, AttributeError, KeyError, ValueError, RecursionError) as error:
            problems.append(f"{name}: not what a checkpoint's file holds ({error})")
        return None

    model_states = files.model_states or {
        rank: name for (data_rank, rank), name in files.scattered.items() if data_rank == 0
    }
    for rank, name in model_states.items():
        metadata = read(name, read_metadata)
        if metadata is not None:
            structure.metadata[rank] = metadata
            if metadata.weights is not None and not files.scattered:
                for (layer, tensor_name), tensor in metadata.weights.items():
                    structure.tensors.setdefault((layer, rank), {})[tensor_name] = tensor
    for place, name in files.layers.items():
        tensors = read(name, read_tensors)
        if tensors is not None:
            structure.tensors[place] = tensors
    for ranks, name in files.optimizer.items() if needs_optimizer else ():
        part = read(name, read_optimizer_part)
        if part is not None:
            structure.optimizer[ranks] = part
    for (data_rank, _), name in files.scattered.items():
        if data_rank:
            read(name, read_metadata)
    try:
        structure.ledger = read_ledger(path)
    except CheckpointError as error:
        problems.append(_relative(error, path))


def _irregular(checkpoint: Path) -> Iterator[str]:
    """Yield what stands where files should: links lead out, FIFOs and devices never end."""
    for folder, folders, names in os.walk(checkpoint):
        for name in sorted((*folders, *names)):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                yield f"{path.relative_to(checkpoint)}: a symbolic link; copy its file (cp -rL)"
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                yield f"{path.relative_to(checkpoint)}: neither a file nor a directory"


def _missing_model_files(structure: Structure) -> Iterator[str]:
    files, size = structure.files, structure.tensor_parallel_size
    model_ranks, data_ranks = structure.model_ranks, structure.data_parallel_size
    if files.scattered:
        expected = {(data, rank) for data in range(data_ranks) for rank in range(model_ranks)}
        yield from _missing(
            (f"zero_pp_rank_{data}_mp_rank_{rank:02d}_model_states.pt", (data, rank))
            for data, rank in sorted(expected - set(files.scattered))
        )
        return
    if files.model_states:
        yield from _missing(
            (f"mp_rank_{rank:02d}_model_states.pt", rank)
            for rank in sorted(set(range(model_ranks)) - set(files.model_states))
        )
        for rank in sorted(set(files.model_states) - set(range(model_ranks))):
            yield f"{files.model_states[rank]}: left by another save, {model_ranks} were written"
        stages, rest = divmod(model_ranks, size)
        if rest:
            yield (
                f"{files.model_states[min(files.model_states)]}: {model_ranks} model ranks don't "
                f"divide into tensor-parallel groups of {size}"
            )
        elif not structure.is_pipeline and stages != 1:
            yield (
                f"{files.model_states[min(files.model_states)]}: {model_ranks} model ranks, but "
                f"weights of {size} tensor ranks"
            )
    if structure.is_pipeline:
        yield from _missing(
            (f"layer_{layer:02d}-model_{rank:02d}-model_states.pt", (layer, rank))
            for layer in _expected_layers(structure)
            for rank in range(size)
            if (layer, rank) not in files.layers
        )
        for (layer, rank), name in files.layers.items():
            if rank >= size:
                yield f"{name}: left by another save, layer {layer} was saved in {size} parts"


def _missing(files: Iterable[tuple[str, Any]]) -> Iterator[str]:
    names = [name for name, _ in files]
    if names:
        more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        verb = "is" if len(names) == 1 else "are"
        yield f"{', '.join(names[:_LISTED])}{more} {verb} missing"


def _expected_layers(structure: Structure) -> list[int]:
    """Return the numbers of the layers that have files: of the transformer, and those around it."""
    expected = {layer for layer, _ in structure.files.layers}
    for metadata in structure.metadata.values():
        expected |= {layer for group in metadata.shapes or () for layer, _ in group}
    for part in structure.optimizer.values():
        expected |= {layer for layer, _ in part.sliced or ()}
    count = structure.first.arguments.get("num_layers") if structure.first is not None else None
    if type(count) is int:
        # 1 and count + 2 are functions without weights; a tied head has no file.
        expected |= {0, *range(2, count + 2), count + 3}
    else:
        blocks = [
            layer
            for (layer, _), tensors in structure.tensors.items()
            if any(name.startswith("input_layernorm.") for name in tensors)
        ]
        expected |= {0, *range(2, max(blocks, default=1) + 1)}
    return sorted(expected)


def _other_steps(structure: Structure) -> Iterator[str]:
    """Yield where files contradict each other on when, and at which topology, they were written."""
    if not structure.metadata:
        return
    files = structure.files
    names = files.model_states or {rank: files.scattered[0, rank] for rank in structure.metadata}
    reference = min(structure.metadata)
    first = structure.metadata[reference]
    folder = structure.checkpoint.name
    named = step_of(folder)
    if first.iteration is None:
        yield f"{names[reference]}: it does not say its iteration"
    elif named is not None and first.iteration != named:
        yield f"{names[reference]}: of step {first.iteration}, in a directory called {folder}"
    ledger = structure.ledger
    if ledger is not None and first.iteration is not None and ledger.step != first.iteration:
        yield f"ledger.json: of step {ledger.step}, beside files of step {first.iteration}"
    for rank, metadata in structure.metadata.items():
        yield from (
            f"{names[rank]}: {what} is {value!r}, but {other!r} in {names[reference]}"
            for what, value, other in _different(metadata, first)
        )


def _different(one: Metadata, other: Metadata) -> Iterator[tuple[str, Any, Any]]:
    sizes = ("data_parallel_size", "model_ranks", "writer", "zero_stage")
    pairs = [(name, getattr(one, name), getattr(other, name)) for name in sizes]
    for mine, theirs in ((one.counters, other.counters), (one.arguments, other.arguments)):
        pairs += [(name, mine.get(name), theirs.get(name)) for name in {**theirs, **mine}]
    yield from (pair for pair in pairs if pair[1] != pair[2])


def _shape_problems(structure: Structure) -> Iterator[str]:
    arguments = structure.first.arguments if structure.first is not None else {}
    size = structure.tensor_parallel_size
    of_layer: dict[str, tuple[str, Tensor]] = {}  # tensor name -> where first seen, what it is
    for (layer, rank), tensors in sorted(structure.tensors.items()):
        file = structure.files.layers.get(
            (layer, rank), structure.files.model_states.get(rank, f"layer {layer}")
        )
        twin = structure.tensors.get((layer, 0), tensors)
        if different := sorted(set(twin) ^ set(tensors)):
            yield (
                f"{file}: layer {layer} has other tensors than on tensor rank 0: "
                f"{', '.join(different[:_LISTED])}"
            )
        for name, tensor in tensors.items():
            expected = _expected_shape(name, arguments, size)
            if expected is not None and not _fits(tensor.shape, expected):
                yield (
                    f"{file}: {name} of layer {layer} has shape {list(tensor.shape)}, "
                    f"the stored arguments make it {_shown(expected)}"
                )
            where, seen = of_layer.setdefault(name, (file, tensor))
            if seen != tensor:
                yield f"{file}: {name} of layer {layer} is {tensor}, but {seen} in {where}"
    yield from _shapes_told_by_metadata(structure)


def _shapes_told_by_metadata(structure: Structure) -> Iterator[str]:
    """Compare the weights with the shapes that DeepSpeed keeps beside the optimizer state."""
    if structure.files.scattered:
        return
    size = structure.tensor_parallel_size
    for rank, metadata in structure.metadata.items():
        name = structure.files.model_states[rank]
        for (layer, tensor), shape in _all_shapes(metadata.shapes):
            tensors = structure.tensors.get((layer, rank % size))
            if tensors is None:
                continue  # the file is missing or damaged, which has been said
            if tensor not in tensors:
                yield f"{name}: it counts on {tensor} of layer {layer}, which is not stored"
            elif tensors[tensor].shape != shape:
                yield (
                    f"{name}: {tensor} of layer {layer} is {list(shape)} for the optimizer and "
                    f"{list(tensors[tensor].shape)} as a weight"
                )


def _all_shapes(
    groups: tuple[Mapping[Place, tuple[int, ...]], ...] | None,
) -> Iterator[tuple[Place, tuple[int, ...]]]:
    for group in groups or ():
        yield from group.items()


def _expected_shape(
    name: str, arguments: Mapping[str, Any], size: int
) -> tuple[int | None, ...] | None:
    """Return the shape that the stored arguments give a tensor; None where they don't tell."""
    hidden = arguments.get("hidden_size")
    rows, positions = arguments.get("padded_vocab_size"), arguments.get("max_position_embeddings")
    if type(hidden) is not int:
        return None
    module, _, kind = name.rpartition(".")
    module = module.rpartition(".")[2]
    if name in ("word_embeddings.weight", "final_linear.weight"):
        return (math.ceil(rows / size) if type(rows) is int else None, hidden)
    if name == "position_embeddings.weight":
        return (positions if type(positions) is int else None, hidden)
    if module in ("input_layernorm", "post_attention_layernorm", "norm"):
        return (1,) if kind == "g" else (hidden,)
    if kind == "weight" and module in ("query_key_value", "linear1", "dense_h_to_4h"):
        return (None, hidden)
    if module in ("dense", "linear2", "dense_4h_to_h"):
        return (hidden, None) if kind == "weight" else (hidden,)
    return None


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(
        wanted in (None, length) for length, wanted in zip(shape, expected, strict=True)
    )


def _shown(expected: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if one is None else str(one) for one in expected) + "]"


def _relative(error: CheckpointError, checkpoint: Path) -> str:
    text = str(error)
    return text.replace(f"{checkpoint}/", "", 1) if text.startswith(str(checkpoint)) else text
