"""Whether the optimizer state of all ranks is complete, of one step, and of the model's size."""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.checkpoint.checkpoint_files import TorchFiles
from megatron.checkpoint.stored_headers import (
    RIGID,
    Metadata,
    OptimizerPart,
    Tensor,
    is_parameter,
)

__all__ = ["NO_OPTIMIZER_FILE", "optimizer_problems"]

NO_OPTIMIZER_FILE = "no optimizer file is there"  # in the problem of a checkpoint of weights alone

_ALIGNMENT = 4  # DeepSpeed pads a flat vector to a multiple of 2 or 4 times the ranks
_LISTED = 4  # of missing files, in one message


def optimizer_problems(
    *,
    files: TorchFiles,
    metadata: Mapping[int, Metadata],
    parts: Mapping[tuple[int, int], OptimizerPart],
    tensors: Mapping[tuple[int, int], Mapping[str, Tensor]],
    sizes: tuple[int, int],
    tensor_parallel_size: int,
) -> list[str]:
    """Return what is wrong with the optimizer state; each problem names its file first.

    Args:
        files: of the checkpoint.
        metadata: by model rank.
        parts: optimizer files by data-parallel and model rank, as far as they could be read.
        tensors: weights by layer and tensor rank.
        sizes: how many model ranks and data-parallel ranks the writer had.
        tensor_parallel_size: how many of the model ranks are tensor ranks.
    """
    if not metadata:
        if files.optimizer:
            return ["optimizer files, but no mp_rank_*.pt: nothing says what they belong to"]
        return []  # weights alone, as of a converted model
    whole = {rank: one.optimizer for rank, one in metadata.items() if one.optimizer is not None}
    if whole and not files.optimizer:
        return list(_whole(files, metadata, whole, tensors, tensor_parallel_size))
    problems = list(_missing_files(files, *sizes))
    problems += _disagreements(files, parts)
    for rank, one in metadata.items():
        mine = {data: part for (data, model), part in parts.items() if model == rank}
        if len(mine) == sizes[1]:
            name = files.optimizer[0, rank]
            problems += [f"{name}: {what}" for what in _size_problems(one, mine, sizes[1])]
    return problems


def _missing_files(files: TorchFiles, model_ranks: int, data_ranks: int) -> Iterator[str]:
    expected = {(data, rank) for data in range(data_ranks) for rank in range(model_ranks)}
    prefix = "bf16_" if files.are_bf16 else ""
    names = [
        f"{prefix}zero_pp_rank_{data}_mp_rank_{rank:02d}_optim_states.pt"
        for data, rank in sorted(expected - set(files.optimizer))
    ]
    if len(names) == len(expected):
        yield (
            f"{names[0]}: {NO_OPTIMIZER_FILE}, of {len(expected)}: the weights can be "
            "loaded, but not gone on from exactly"
        )
    elif names:
        more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        verb = "is" if len(names) == 1 else "are"
        yield f"{', '.join(names[:_LISTED])}{more} {verb} missing"
    for place in sorted(set(files.optimizer) - expected):
        yield (
            f"{files.optimizer[place]}: left by another save: the checkpoint has {data_ranks} "
            f"data-parallel and {model_ranks} model ranks"
        )
    kinds = {name.startswith("bf16_") for name in files.optimizer.values()}
    if len(kinds) > 1:
        other = next(n for n in files.optimizer.values() if not n.startswith("bf16_"))
        yield f"{other}: beside files of the bf16 optimizer, so of another save"


def _disagreements(
    files: TorchFiles, parts: Mapping[tuple[int, int], OptimizerPart]
) -> Iterator[str]:
    """Yield where files are of different steps or writers."""
    if not parts:
        return
    reference = min(parts)
    first = parts[reference]
    for place, part in sorted(parts.items()):
        name = files.optimizer[place]
        pairs: list[tuple[str, Any, Any]] = [
            ("its optimizer", part.kind, first.kind),
            ("its number of steps", part.step, first.step),
            *(
                (f"its loss scaler's {key}", part.scaler.get(key), first.scaler.get(key))
                for key in {**first.scaler, **part.scaler}
            ),
        ]
        for what, mine, theirs in pairs:
            if mine != theirs:
                yield f"{name}: {what} is {mine}, but {theirs} in {files.optimizer[reference]}"
        for what, moments in (("exp_avg", part.exp_avg), ("exp_avg_sq", part.exp_avg_sq)):
            if not _moments_fit(part, moments):
                yield (
                    f"{name}: {what} has {list(moments)} elements, the parameters' copies have "
                    f"{list(part.masters)}"
                )


def _moments_fit(part: OptimizerPart, moments: tuple[int, ...]) -> bool:
    if not moments or not sum(moments):
        return True  # saved before a first step
    paddings = [*part.paddings, *([0] * len(part.masters))]
    return len(moments) == len(part.masters) and all(
        # masters are stored without the padding at the end of a group, moments with it
        master <= moment <= master + padding
        for master, moment, padding in zip(part.masters, moments, paddings, strict=False)
    )


def _size_problems(
    metadata: Metadata, parts: Mapping[int, OptimizerPart], data_ranks: int
) -> Iterator[str]:
    first = parts[0]
    for count in first.partition_counts:
        if count != data_ranks:
            yield f"it was divided over {count} ranks, the checkpoint has {data_ranks}"
            return
    shapes = metadata.shapes or first.shapes
    if shapes is None:
        return
    needed = [sum(_numel(shape) for shape in group.values()) for group in shapes]
    held = [sum(group) for group in zip(*(part.masters for part in parts.values()), strict=False)]
    if len(needed) != len(held):  # v1.0 keeps the shapes of all groups together
        needed, held = [sum(needed)], [sum(held)]
    count = sum(len(group) for group in shapes)
    for group, (wanted, found) in enumerate(zip(needed, held, strict=True)):
        paddings = sum(sum(part.paddings) for part in parts.values())
        # ZeRO 3 pads every parameter to a multiple of the ranks.
        slack = paddings + data_ranks * (_ALIGNMENT + (count if first.kind == "ZeRO 3" else 0))
        most = found if first.kind == RIGID else wanted + slack
        if not wanted <= found <= most:
            yield (
                f"all ranks together hold {found} elements of parameter group {group}, "
                f"its parameters have {wanted}"
            )


def _whole(
    files: TorchFiles,
    metadata: Mapping[int, Metadata],
    states: Mapping[int, OptimizerPart],
    tensors: Mapping[tuple[int, int], Mapping[str, Tensor]],
    tensor_parallel_size: int,
) -> Iterator[str]:
    """Check state that isn't divided over data-parallel ranks: it stands in the metadata files."""
    reference = min(states)
    for rank in metadata:
        name = files.model_states[rank]
        if rank not in states:
            yield f"{name}: it holds no optimizer state, {files.model_states[reference]} does"
            continue
        pairs = [("its number of steps", states[rank].step, states[reference].step)]
        pairs += [
            (f"its loss scaler's {key}", states[rank].scaler.get(key), value)
            for key, value in states[reference].scaler.items()
        ]
        for what, mine, theirs in pairs:
            if mine != theirs:
                yield f"{name}: {what} is {mine}, but {theirs} in {files.model_states[reference]}"
        exp_avg, exp_avg_sq = states[rank].exp_avg, states[rank].exp_avg_sq
        masters = states[rank].masters or exp_avg
        if sum(exp_avg) and not exp_avg == exp_avg_sq == masters:
            yield (
                f"{name}: exp_avg has {sum(exp_avg)} elements, exp_avg_sq {sum(exp_avg_sq)}, the "
                f"parameters' copies {sum(masters)}"
            )
    for tensor_rank in range(tensor_parallel_size):
        stages = [states[rank] for rank in states if rank % tensor_parallel_size == tensor_rank]
        held = sum(sum(state.masters or state.exp_avg) for state in stages)
        layers = {layer: held for (layer, rank), held in tensors.items() if rank == tensor_rank}
        needed = sum(
            tensor.numel
            for layer in layers.values()
            for name, tensor in layer.items()
            if is_parameter(name)
        )
        embedding = layers.get(0, {}).get("word_embeddings.weight")
        # Tied to the head, it is also on the last stage.
        twice = needed + (embedding.numel if embedding is not None and len(stages) > 1 else 0)
        if held and held not in (needed, twice):
            yield (
                f"{files.model_states[tensor_rank]}: the optimizers of tensor rank {tensor_rank} "
                f"hold {held} elements, its parameters have {needed}"
            )


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product
