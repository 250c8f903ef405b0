"""Optimizer state that NeoX v1.0's ZeRO stage 1 wrote, as in the released Pythia checkpoints.

Parameters stand in one vector per group, matrices before norms and biases. The vector is padded at
its end and cut into equal sub-partitions, dealt to the data-parallel ranks in rounds, the
communication intervals: sub-partition s belongs to rank s % ranks, interval s // ranks. There are
two forms:

elastic   the padding was cut off again, so that the last sub-partitions are shorter or empty;
          neither Adam's step nor the groups' settings are stored
rigid     everything as the optimizer held it, with the ``state_dict`` of torch's optimizer

Which parameters a group has isn't stored either; ``param_shapes`` lists those of both together.
"""

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron.base.errors import CheckpointError
from megatron.checkpoint.compatibility import WEIGHTS_ALONE, AdamStepRule
from megatron.checkpoint.flat_partitions import Kind
from megatron.checkpoint.stored import StoredCheckpoint, model_states_file
from megatron.checkpoint.stored_layout import (
    ParameterKey,
    StageLayout,
    StoredParameter,
    named_layout,
)
from megatron.checkpoint.stored_optimizer import (
    LossScale,
    StoredOptimizer,
    groups_of,
    require_shapes,
)
from megatron.model.settings import ModelSettings
from megatron.optim.param_groups import decays_by_name

__all__ = ["open_v1_optimizer"]

_DUMMY_STEPS = 1  # v1.0's optimizers step once, on zero gradients, when they are made
_GROUP_NAMES = ("weight_decay_params", "no_weight_decay_params")


@dataclass(frozen=True)
class _RankPart:
    """The sub-partitions of one data-parallel rank, by parameter group and interval."""

    source: str  # the file, for messages
    masters: Sequence[Sequence[torch.Tensor]]
    moments: Sequence[Sequence[Mapping[str, Any]]]
    groups: Sequence[Mapping[str, Any]] | None  # settings and step; None: elastic

    @property
    def step(self) -> int | None:
        """Adam's step, if it is stored."""
        if self.groups is None:
            return None
        return max(int(group.get("step", 0)) for group in self.groups)

    def vectors(self, group: int, kind: Kind) -> list[torch.Tensor]:
        """Return the sub-partitions of a group.

        Raises:
            CheckpointError: master and moment are not of one size.
        """
        masters = self.masters[group]
        if kind == "master":
            return list(masters)
        moments = [entry.get(kind) for entry in self.moments[group]]
        sizes = [moment.numel() if torch.is_tensor(moment) else None for moment in moments]
        if sizes != [master.numel() for master in masters]:
            raise CheckpointError(
                f"{self.source}: {kind} of group {group} has {sizes} elements in each interval, "
                f"the parameters' copies have {[master.numel() for master in masters]}: the file "
                "is damaged, or another optimizer than Adam wrote it"
            )
        return [moment for moment in moments if torch.is_tensor(moment)]


class _DealtVector:
    """One group's vector on one stage and tensor rank: where each sub-partition begins."""

    def __init__(self, parts: Sequence[_RankPart], group: int) -> None:
        counts = {len(part.masters[group]) for part in parts}
        if len(counts) != 1:
            raise CheckpointError(
                f"{parts[0].source} and the files of the other {len(parts) - 1} data-parallel "
                f"ranks hold {sorted(counts)} intervals of group {group}: they come from "
                "different saves"
            )
        self._parts = parts
        self._group = group
        # sub-partition s: interval s // ranks of rank s % ranks
        self._lengths = [
            part.masters[group][interval].numel()
            for interval in range(counts.pop())
            for part in parts
        ]
        self._starts = list(itertools.accumulate(self._lengths, initial=0))

    @property
    def num_elements(self) -> int:
        """Elements of all ranks, padding included where the file kept it."""
        return self._starts[-1]

    def pieces(self, start: int, stop: int, kind: Kind) -> list[torch.Tensor]:
        """Return the elements from ``start`` to ``stop``, which lie in one or more files."""
        pieces = []
        index = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            interval, rank = divmod(index, len(self._parts))
            vector = self._parts[rank].vectors(self._group, kind)[interval]
            first = start - self._starts[index]
            last = min(stop - self._starts[index], self._lengths[index])
            if first < last:
                pieces.append(vector.reshape(-1)[first:last])
            start += max(0, last - first)
            index += 1
        return pieces


class _DealtState:
    """The vectors of all stages and tensor ranks; files are opened when asked for.

    Args:
        open_parts: returns what the data-parallel ranks of (stage, tensor rank) hold.
        needed: elements of each stage's groups.
    """

    def __init__(
        self,
        open_parts: Callable[[int, int], Sequence[_RankPart]],
        needed: Sequence[Sequence[int]],
    ) -> None:
        self._open = open_parts
        self._needed = needed
        self._opened: dict[tuple[int, int], list[_DealtVector]] = {}

    def pieces(
        self, key: ParameterKey, place: StoredParameter, tensor_rank: int, kind: Kind
    ) -> list[torch.Tensor]:
        """Return a parameter in consecutive pieces, as ``OptimizerReader`` has it."""
        where = place.stage, tensor_rank
        if where not in self._opened:
            self._opened[where] = self._vectors(*where)
        vector = self._opened[where][place.group]
        return vector.pieces(place.offset, place.offset + place.num_elements, kind)

    def _vectors(self, stage: int, tensor_rank: int) -> list[_DealtVector]:
        parts = self._open(stage, tensor_rank)
        needed = list(self._needed[stage])
        if {len(part.masters) for part in parts} != {len(needed)}:
            raise CheckpointError(
                f"{parts[0].source} and its siblings hold "
                f"{sorted({len(part.masters) for part in parts})} parameter groups where "
                f"{len(needed)} are expected: they come from different saves"
            )
        vectors = [_DealtVector(parts, group) for group in range(len(needed))]
        held = [vector.num_elements for vector in vectors]
        is_elastic = parts[0].groups is None
        if held != needed if is_elastic else any(map(int.__lt__, held, needed)):
            raise CheckpointError(
                f"{parts[0].source} and the files of the other {len(parts) - 1} data-parallel "
                f"ranks hold groups of {held} elements; the parameters named there have {needed}: "
                "a file is missing, of another save, or of a model whose decaying parameters are "
                "others than its matrices"
            )
        return vectors


def open_v1_optimizer(
    stored: StoredCheckpoint, settings: ModelSettings, *, adam_step: AdamStepRule
) -> StoredOptimizer:
    """Return the optimizer of a checkpoint that NeoX v1.0's ZeRO wrote; no values are read.

    Args:
        stored: the checkpoint.
        settings: the model, with the checkpoint's pinned vocabulary.
        adam_step: for the elastic form. ``continue``: Adam has counted the updates and one dummy
            step, which makes a resume equal the uninterrupted run. ``neox-v1-resume``: it counts
            from the dummy step again, as v1.0 itself does when it loads the file.

    Raises:
        CheckpointError: a file is missing or damaged, or its form is not known.
    """
    num_ranks = _data_ranks(stored)

    def parts(stage: int, tensor_rank: int) -> list[_RankPart]:
        model_rank = stage * stored.tensor_parallel_size + tensor_rank
        opened = [_rank_part(stored, model_rank, data_rank) for data_rank in range(num_ranks)]
        steps = {part.step for part in opened}
        if steps != {first.step}:
            raise CheckpointError(
                f"{opened[0].source} and its siblings were saved after {sorted(map(str, steps))} "
                f"optimizer steps, {first.source} after {first.step}: they come from different "
                "saves"
            )
        return opened

    first = _rank_part(stored, 0, 0)
    state, _ = _state(stored, 0, 0)
    layouts = [_layout(stored, stage) for stage in range(stored.num_stages)]
    require_shapes(stored, layouts, settings)
    groups = first.groups
    if groups is None:
        names = _GROUP_NAMES if len(first.masters) > 1 else _GROUP_NAMES[1:]
        groups = [{"name": name} for name in names]
    step = first.step
    if step is None:
        step = _DUMMY_STEPS + (_updates(stored) if adam_step == "continue" else 0)
    needed = [
        [
            sum(place.num_elements for place in layout.values() if place.group == group)
            for group in range(len(groups))
        ]
        for layout in layouts
    ]
    return StoredOptimizer(
        layouts=layouts,
        reader=_DealtState(parts, needed),
        step=step,
        groups=groups_of([{"param_groups": groups}] * len(layouts), layouts),
        scaler=_scaler(state),
        gradient_multiple=1,  # v1.0 divides by the micro steps
    )


def _data_ranks(stored: StoredCheckpoint) -> int:
    """Return how many data-parallel ranks wrote the checkpoint, all of whose files are there."""
    files = {data_rank for _, data_rank in stored.optimizer_files}
    told = stored.model_states(stored.model_ranks[0]).get("dp_world_size")
    num_ranks = told if isinstance(told, int) else 1 + max(files)
    if missing := sorted(set(range(num_ranks)) - files):
        raise CheckpointError(
            f"{stored.directory} was written by {num_ranks} data-parallel ranks, but the optimizer "
            f"files of ranks {', '.join(map(str, missing))} are missing; {WEIGHTS_ALONE}"
        )
    return num_ranks


def _state(
    stored: StoredCheckpoint, model_rank: int, data_rank: int
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return a file's optimizer state, and the shapes of its parameters."""
    name = stored.optimizer_files.get((model_rank, data_rank))
    if name is None:
        raise CheckpointError(
            f"{stored.directory} lacks zero_pp_rank_{data_rank}_mp_rank_{model_rank:02d}"
            f"_optim_states.pt; {WEIGHTS_ALONE}"
        )
    content = stored.optimizer_states(name)
    state, shapes = content.get("optimizer_state_dict"), content.get("param_shapes")
    if not isinstance(state, Mapping) or not isinstance(shapes, Mapping):
        raise CheckpointError(
            f"{stored.directory / name} lacks optimizer_state_dict or param_shapes: NeoX v1.0's "
            "ZeRO did not write it"
        )
    return state, shapes


def _rank_part(stored: StoredCheckpoint, model_rank: int, data_rank: int) -> _RankPart:
    state, _ = _state(stored, model_rank, data_rank)
    source = str(stored.directory / stored.optimizer_files[model_rank, data_rank])
    base = state.get("base_optimizer_state")
    masters = state.get("local_sub_partitions_of_fp32_groups")
    try:
        masters = [list(group) for group in masters]
        if isinstance(base, Mapping):
            groups = list(base["param_groups"])
            moments = [[base["state"][number] for number in group["params"]] for group in groups]
        else:
            groups = None
            moments = [list(group) for group in base]
        shape = [len(group) for group in masters]
        if [len(group) for group in moments] != shape or not all(
            isinstance(entry, Mapping) for group in moments for entry in group
        ):
            raise ValueError(f"its moments are not in intervals of {shape}, as its masters are")
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{source} holds optimizer state of a form that is not known "
            f"({type(error).__name__}: {error}); {WEIGHTS_ALONE}"
        ) from error
    return _RankPart(source, masters, moments, groups)


def _layout(stored: StoredCheckpoint, stage: int) -> StageLayout:
    model_rank = stage * stored.tensor_parallel_size
    _, shapes = _state(stored, model_rank, 0)
    if len(_rank_part(stored, model_rank, 0).masters) == 1:  # weight_decay 0: nothing is set apart
        return named_layout([shapes], stage=stage)
    groups: list[dict[str, Sequence[int]]] = [{}, {}]
    for name, shape in shapes.items():
        groups[0 if decays_by_name(name) else 1][name] = shape
    return named_layout(groups, stage=stage)


def _updates(stored: StoredCheckpoint) -> int:
    """Return the updates made: overflowing steps are left out of the schedule's count."""
    metadata = stored.model_states(stored.model_ranks[0])
    schedule = metadata.get("lr_scheduler")
    count = schedule.get("num_iters") if isinstance(schedule, Mapping) else None
    if isinstance(count, int):
        return count
    skipped = metadata.get("skipped_steps")
    if isinstance(skipped, int):
        return stored.iteration - skipped
    name = model_states_file(stored.model_ranks[0])
    raise CheckpointError(
        f"{stored.directory / name} holds neither lr_scheduler.num_iters nor skipped_steps, so "
        f"nothing says how many updates Adam has made; {WEIGHTS_ALONE}"
    )


def _scaler(state: Mapping[str, Any]) -> LossScale | None:
    scaler = state.get("loss_scaler")
    if not state.get("dynamic_loss_scale") or scaler is None:
        return None
    values = vars(scaler)
    return LossScale(
        scale=float(values["cur_scale"]),
        iteration=int(values["cur_iter"]),
        last_overflow_iteration=int(values["last_overflow_iter"]),
        hysteresis=values.get("cur_hysteresis"),
    )
