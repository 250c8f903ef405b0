"""What one torch file of a checkpoint says, without the values of its tensors.

Only numbers, names and shapes are kept, so that a checkpoint of any size can be looked at as a
whole. No torch.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.base.errors import CheckpointError
from megatron.base.torch_metadata import StoredObject, StoredTensor, read_torch_metadata

__all__ = [
    "ELASTIC",
    "RIGID",
    "Metadata",
    "OptimizerPart",
    "Tensor",
    "is_parameter",
    "parameter_place",
    "read_metadata",
    "read_optimizer_part",
    "read_tensors",
]

_NUMBERED = re.compile(r"(?:sequential\.)?(\d+)\.(.+)")
_TIED = re.compile(r"tied_modules\.[^.]+\.(.+)")
ELASTIC = "elastic ZeRO 1"
"""NeoX v1.0's, with the padding cut off."""

RIGID = "rigid ZeRO 1"
"""NeoX v1.0's with ``elastic_checkpoint: false``: nothing says where its padding begins."""

_BUFFERS = ("inv_freq", "_extra_state", "slopes")


@dataclass(frozen=True)
class Tensor:
    """A tensor's type and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


Place = tuple[int, str]
"""Layer number and name within the layer."""


@dataclass(frozen=True)
class OptimizerPart:
    """Optimizer state of one rank; sizes are numbers of elements, one for each parameter group."""

    kind: str  # "ZeRO 1", "ZeRO 3", "bf16", ELASTIC, RIGID, "fp16", "plain"
    masters: tuple[int, ...] = ()
    exp_avg: tuple[int, ...] = ()
    exp_avg_sq: tuple[int, ...] = ()
    paddings: tuple[int, ...] = ()  # elements of each group beyond the parameters'
    partition_counts: tuple[int, ...] = ()
    step: int | None = None  # None: not stored as a number
    scaler: Mapping[str, Any] = field(default_factory=dict)
    sliced: Mapping[Place, int] | None = None  # elements of each parameter in this part
    shapes: tuple[Mapping[Place, tuple[int, ...]], ...] | None = None


@dataclass(frozen=True)
class Metadata:
    """What a model-states file says beside tensors."""

    iteration: int | None
    counters: Mapping[str, Any]
    arguments: Mapping[str, Any]
    data_parallel_size: int | None
    model_ranks: int | None
    shapes: tuple[Mapping[Place, tuple[int, ...]], ...] | None  # of each parameter group
    weights: Mapping[Place, Tensor] | None  # None: a pipeline's, in layer files
    optimizer: OptimizerPart | None
    zero_stage: int
    writer: str


def is_parameter(name: str) -> bool:
    """Whether a tensor of a layer is trained."""
    return not name.endswith(_BUFFERS)


def parameter_place(name: str) -> Place | None:
    """Return layer and name of a parameter that DeepSpeed calls ``name``."""
    if match := _NUMBERED.fullmatch(name):
        return int(match[1]), match[2]
    if match := _TIED.fullmatch(name):
        return 0, match[1]  # the embedding is the only layer that stands in two places
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a layer file.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything else.
    """
    tensors = {}
    for name, value in read_torch_metadata(path).items():
        if isinstance(value, StoredTensor) and isinstance(name, str):
            tensors[name] = Tensor(value.dtype, value.shape)
        elif value is not None:  # megatron-core's empty entries
            raise CheckpointError(f"{path} holds a {type(value).__name__} called {name!r}")
    return tensors


def read_metadata(path: Path) -> Metadata:
    """Return what a model-states file says.

    Raises:
        CheckpointError: the file is missing, damaged, or lacks what every such file has.
    """
    content = read_torch_metadata(path)
    step = content.get("iteration", content.get("total_iters"))
    module, scheduler = content.get("module"), _mapping(content.get("lr_scheduler"))
    settings = _mapping(content.get("ds_config"))
    return Metadata(
        iteration=_number(step),
        counters={
            "iteration": step,
            "global_steps": content.get("global_steps"),
            "skipped_steps": content.get("skipped_steps"),
            "lr_scheduler.num_iters": scheduler.get("num_iters"),
        },
        arguments=_mapping(content.get("args")),
        data_parallel_size=_number(content.get("dp_world_size")),
        model_ranks=_number(content.get("mp_world_size")),
        shapes=_shapes(content.get("param_shapes")),
        weights=None if module is None else dict(_placed_tensors(path, module)),
        optimizer=_plain_optimizer(_mapping(content.get("optimizer"))),
        zero_stage=_number(_mapping(settings.get("zero_optimization")).get("stage")) or 0,
        writer=f"DeepSpeed {content.get('ds_version') or 'before 0.4'}",
    )


def read_optimizer_part(path: Path) -> OptimizerPart:
    """Return what a ZeRO file says.

    Raises:
        CheckpointError: the file is missing, damaged, or of a format that is not known.
    """
    content = read_torch_metadata(path)
    state = _mapping(content.get("optimizer_state_dict"))
    base = state.get("base_optimizer_state")
    common = {
        "paddings": _numbers(state.get("group_paddings")),
        "partition_counts": _numbers(state.get("partition_count")),
        "scaler": _scaler(state.get("loss_scaler")),
        "sliced": _sliced(state.get("param_slice_mappings")),
        "shapes": _shapes(content.get("param_shapes")),
    }
    if "fp32_flat_groups" in state:
        inner = _mapping(state.get("optimizer_state_dict"))
        return _part("ZeRO 3", state["fp32_flat_groups"], inner, common)
    if isinstance(base, Mapping) and "single_partition_of_fp32_groups" in state:
        stage = state.get("zero_stage")
        kind = (
            f"ZeRO {stage.attributes.get('value')}" if isinstance(stage, StoredObject) else "bf16"
        )
        return _part(kind, state["single_partition_of_fp32_groups"], base, common)
    if isinstance(base, Mapping) and "local_sub_partitions_of_fp32_groups" in state:
        states = _mapping(base.get("state"))
        numbers = [group.get("params", ()) for group in map(_mapping, base.get("param_groups", ()))]
        moments = [[states.get(number) for number in group] for group in numbers]
        return OptimizerPart(
            RIGID,
            masters=_sums(state["local_sub_partitions_of_fp32_groups"]),
            exp_avg=_sums([_moments(group, "exp_avg") for group in moments]),
            exp_avg_sq=_sums([_moments(group, "exp_avg_sq") for group in moments]),
            step=_step(base),
            **common,
        )
    if isinstance(base, list) and "local_sub_partitions_of_fp32_groups" in state:
        return OptimizerPart(
            ELASTIC,
            masters=_sums(state["local_sub_partitions_of_fp32_groups"]),
            exp_avg=_sums([_moments(group, "exp_avg") for group in base]),
            exp_avg_sq=_sums([_moments(group, "exp_avg_sq") for group in base]),
            **common,
        )
    raise CheckpointError(f"{path} holds optimizer state of a format that is not known")


def _part(
    kind: str, masters: Any, inner: Mapping[str, Any], common: dict[str, Any]
) -> OptimizerPart:
    states = [_mapping(state) for state in _mapping(inner.get("state")).values()]
    return OptimizerPart(
        kind,
        masters=_sums([[tensor] for tensor in masters]),
        exp_avg=_sums([[state.get("exp_avg")] for state in states]),
        exp_avg_sq=_sums([[state.get("exp_avg_sq")] for state in states]),
        step=_step(inner),
        **common,
    )


def _plain_optimizer(state: Mapping[str, Any]) -> OptimizerPart | None:
    """Read the state of an optimizer that isn't partitioned: all groups taken together."""
    if not state:
        return None
    inner = _mapping(state.get("optimizer_state_dict", state))
    states = [_mapping(one) for one in _mapping(inner.get("state")).values()]
    masters = state.get("fp32_groups_flat", state.get("fp32_groups", []))
    return OptimizerPart(
        "plain" if inner is state or not masters else "fp16",
        masters=(sum(_sums([list(_tensors(masters))])),) if masters else (),
        exp_avg=(sum(_sums([[one.get("exp_avg") for one in states]])),),
        exp_avg_sq=(sum(_sums([[one.get("exp_avg_sq") for one in states]])),),
        step=_step(inner),
        scaler={
            name: state[name]
            for name in ("cur_scale", "cur_iter", "last_overflow_iter")
            if isinstance(state.get(name), int | float)
        },
    )


def _tensors(value: Any) -> Iterator[StoredTensor]:
    if isinstance(value, StoredTensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _moments(group: Any, name: str) -> list[Any]:
    return [_mapping(one).get(name) for one in group] if isinstance(group, list) else []


def _sums(groups: Sequence[Any]) -> tuple[int, ...]:
    return tuple(sum(tensor.numel for tensor in _tensors(list(group))) for group in groups)


def _step(inner: Mapping[str, Any]) -> int | None:
    """Return the steps taken: DeepSpeed's FusedAdam counts in one parameter only."""
    counts = [
        _mapping(entry).get("step")
        for entry in (
            *_mapping(inner.get("state")).values(),
            *(inner.get("param_groups") or ()),
        )
    ]
    return max((count for count in counts if type(count) is int), default=None)


def _scaler(value: Any) -> dict[str, Any]:
    return dict(value.attributes) if isinstance(value, StoredObject) else {}


def _sliced(groups: Any) -> dict[Place, int] | None:
    if not isinstance(groups, list):
        return None
    places: dict[Place, int] = {}
    for name, slice_ in ((name, one) for group in groups for name, one in _mapping(group).items()):
        place = parameter_place(str(name))
        if place is not None and isinstance(slice_, StoredObject):
            places[place] = _number(slice_.attributes.get("numel")) or 0
    return places


def _shapes(groups: Any) -> tuple[dict[Place, tuple[int, ...]], ...] | None:
    # v1.0 has one dictionary for all groups.
    groups = [groups] if isinstance(groups, Mapping) else groups
    if not isinstance(groups, list):
        return None
    return tuple(
        {
            place: shape
            for name, shape in _mapping(group).items()
            if (place := parameter_place(str(name))) is not None and isinstance(shape, tuple)
        }
        for group in groups
    )


def _placed_tensors(path: Path, module: Any) -> Iterator[tuple[Place, Tensor]]:
    for name, value in _mapping(module).items():
        place = parameter_place(str(name))
        if isinstance(value, StoredTensor):
            if place is None:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is not called sequential.<layer>.<name>"
                )
            yield place, Tensor(value.dtype, value.shape)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> int | None:
    return value if type(value) is int else None


def _numbers(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(number for number in values if type(number) is int)
