"""What a checkpoint will hold, taken out of a running training.

DeepSpeed hands every file's content to a checkpoint engine. Ours writes nothing: it copies tensors
into memory of its own and everything else into new objects, so that training may go on while the
copy is written. Tensors that share memory share it in the copy too, as torch.save would keep it.

Weights and optimizer state, which are nearly all of it, don't change before the optimizer's next
step. On the CPU they may therefore be copied later, on another thread, while the next forward and
backward passes run.
"""

import contextlib
import copy
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
)

from megatron.checkpoint.optimizer_state import with_fused_adam_keys
from megatron.checkpoint.safe_torch import read_torch_file

__all__ = ["Snapshot", "SnapshotBuffers", "take_snapshot"]

# Weights are views of ZeRO's flat buffers; a layer's file holds the weights, not the buffers.
_LAYER_FILE = re.compile(r"layer_\d+-model_\d+-model_states\.pt")
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


@dataclass(frozen=True)
class Snapshot:
    """The files of this rank."""

    contents: Mapping[str, Any] = field(default_factory=dict)  # file name -> what torch.save writes
    num_bytes: int = 0  # of tensors
    is_private: bool = True  # False: training's own memory is part of it
    has_recovery_scripts: bool = False  # DeepSpeed leaves some beside such a checkpoint
    problem: str | None = None  # why it could not be taken
    copies_left: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()  # (copy, original)

    def copy_rest(self) -> None:
        """Copy what was left for later; the optimizer must not have taken a step since."""
        for copied, original in self.copies_left:
            copied.copy_(original)


class SnapshotBuffers:
    """Memory that every snapshot of a run uses again.

    A snapshot's buffers are free when the next one begins: at most one is being written.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}
        self._taken: list[torch.Tensor] = []
        self._is_pinned = get_accelerator().device_name() != "cpu"

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        free = [buffer for buffers in self._free.values() for buffer in buffers]
        return sum(buffer.numel() for buffer in (*self._taken, *free))

    @contextlib.contextmanager
    def reused(self) -> Iterator[None]:
        """Begin a snapshot; memory that this one had no use for is given back at its end."""
        for buffer in self._taken:
            self._free.setdefault(buffer.numel(), []).append(buffer)
        self._taken = []
        try:
            yield
            if self._is_pinned:
                get_accelerator().synchronize()  # copies from a device are still under way
        finally:
            self._free = {}

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return ``num_bytes`` of memory on the CPU, as torch.uint8."""
        free = self._free.get(num_bytes)
        if free:
            buffer = free.pop()
        else:
            buffer = torch.empty(num_bytes, dtype=torch.uint8)
            if self._is_pinned and num_bytes:
                buffer = get_accelerator().pin_memory(buffer)
        self._taken.append(buffer)
        return buffer


def take_snapshot(
    engine: Any, directory: Path, client_state: dict[str, Any], buffers: SnapshotBuffers | None
) -> Snapshot:
    """Collect this rank's files of a checkpoint from DeepSpeed. Collective; writes nothing.

    Args:
        engine: DeepSpeed's.
        directory: where the checkpoint will be written.
        client_state: what ``mp_rank_XX_model_states.pt`` holds beside DeepSpeed's own.
        buffers: memory for the copies; None: nothing is copied that lies on the CPU, and training
            must wait until it is written.
    """
    collector = _Collector(buffers, _unchanged_until_a_step(engine))
    with collector.in_place_of_the_engines(engine):
        engine.save_checkpoint(
            str(directory.parent), tag=directory.name, client_state=client_state, save_latest=False
        )
    if collector.problem is not None:
        return Snapshot(problem=collector.problem)
    is_private = buffers is not None and collector.is_private
    return Snapshot(
        collector.contents,
        num_bytes=collector.num_bytes,
        is_private=is_private,
        has_recovery_scripts=collector.has_recovery_scripts,
        copies_left=collector.copies_left,
    )


def _unchanged_until_a_step(engine: Any) -> frozenset[int]:
    """Return the storages of weights, masters and moments: only the optimizer's step writes there.

    Those on a device are left out: their copies must be in line with its work.
    """
    optimizer = engine.basic_optimizer
    tensors = [*engine.module.parameters()]
    tensors.extend(parameter for group in optimizer.param_groups for parameter in group["params"])
    tensors.extend(
        value
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    return frozenset(
        tensor.untyped_storage()._cdata for tensor in tensors if tensor.device.type == "cpu"
    )


class _Collector(CheckpointEngine):
    """Takes what DeepSpeed would have written. A failure is kept for later instead of raised: the
    other ranks are on their way into DeepSpeed's barrier, where they would wait for this one.
    """

    def __init__(self, buffers: SnapshotBuffers | None, may_wait: frozenset[int]) -> None:
        super().__init__()
        self.name = "snapshot"
        self.copies_left: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._may_wait = may_wait
        self.contents: dict[str, Any] = {}
        self.problem: str | None = None
        self.num_bytes = 0
        self.is_private = True
        self.has_recovery_scripts = False
        self._buffers = buffers

    @contextlib.contextmanager
    def in_place_of_the_engines(self, engine: Any) -> Iterator[None]:
        """Let ``engine.save_checkpoint`` hand its files to this object."""
        original, engine.checkpoint_engine = engine.checkpoint_engine, self
        # It would copy scripts into `save` here, on rank 0 alone, and raise there alone.
        engine._copy_recovery_script = self._note_recovery_scripts
        # It would compare the tag between all ranks, which had it from one.
        engine._checkpoint_tag_validation = lambda tag: None
        reuse = contextlib.nullcontext() if self._buffers is None else self._buffers.reused()
        try:
            with reuse:
                yield
        finally:
            engine.checkpoint_engine = original
            del engine._copy_recovery_script, engine._checkpoint_tag_validation

    def _note_recovery_scripts(self, save: str) -> None:
        self.has_recovery_scripts = True

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing to make: rank 0 did."""

    def preserves_storage_sharing(self) -> bool:
        return False  # no copy of DeepSpeed's, which would only be copied again

    def save(self, state_dict: Any, path: str) -> None:
        name = Path(path).name
        shares = _LAYER_FILE.fullmatch(name) is None
        copier = _Copier(self._buffers, shares=shares, may_wait=self._may_wait)
        try:
            self.contents[name] = copier.copy(_as_neox_reads_it(state_dict))
        except Exception as error:  # noqa: BLE001 - raised by all ranks together, later
            self.problem = f"{name} could not be prepared: {type(error).__name__}: {error}"
        self.num_bytes += copier.num_bytes
        self.copies_left.extend(copier.copies_left)
        self.is_private = self.is_private and copier.is_private

    def load(self, path: str, map_location: Any = None) -> Any:
        return read_torch_file(Path(path))

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return self.problem is None


class _Copier:
    """Copies the content of one file."""

    def __init__(
        self,
        buffers: SnapshotBuffers | None,
        *,
        shares: bool,
        may_wait: frozenset[int] = frozenset(),  # storages that may be copied later
    ) -> None:
        self.copies_left: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._may_wait = may_wait
        self.num_bytes = 0
        self.is_private = True
        self._buffers = buffers
        self._shares = shares
        self._storages: dict[int, torch.UntypedStorage] = {}
        # Also keeps every original alive, so that no id is given twice.
        self._memo: dict[int, Any] = {}
        self._originals: list[Any] = []

    def copy(self, value: Any) -> Any:
        """Return ``value`` in memory and objects of its own; what is one object stays one."""
        if isinstance(value, _PLAIN):
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        copied = self._copy(value)
        self._memo[id(value)] = copied
        self._originals.append(value)
        return copied

    def _copy(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value)
        if type(value) in (dict, OrderedDict):
            items = ((self.copy(key), self.copy(item)) for key, item in value.items())
            copied = type(value)(items)
            if self._shares and getattr(value, "__dict__", None):
                copied.__dict__.update(copy.deepcopy(value.__dict__))  # a module's _metadata
            return copied
        if type(value) in (list, tuple, set):
            return type(value)(self.copy(item) for item in value)
        if self._buffers is None:
            return value
        try:
            return copy.deepcopy(value, self._memo)
        except (TypeError, RuntimeError):  # torch.save may still know how to write it
            self.is_private = False
            return value

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or (
            tensor.layout is not torch.strided or tensor.is_quantized
        ):
            self.is_private = False  # written as it is, while training waits
            return tensor
        source = tensor.detach()
        copied = self._whole_storage(source) if self._shares else self._alone(source)
        copied.requires_grad_(tensor.requires_grad)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(copied, requires_grad=tensor.requires_grad)
        return copied

    def _whole_storage(self, source: torch.Tensor) -> torch.Tensor:
        """Copy a tensor's storage, once, and return the same view of the copy."""
        storage = source.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._originals.append(storage)
            self.num_bytes += storage.nbytes()
            if self._buffers is None and storage.device.type == "cpu":
                self._storages[key] = storage
            else:
                whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                copied = self._transfer(self._memory(whole.numel()), whole, key)
                self._storages[key] = copied.untyped_storage()
        view = torch.empty(0, dtype=source.dtype)
        return view.set_(
            self._storages[key], source.storage_offset(), source.size(), source.stride()
        )

    def _alone(self, source: torch.Tensor) -> torch.Tensor:
        num_bytes = source.numel() * source.element_size()
        self.num_bytes += num_bytes
        if self._buffers is None and source.device.type == "cpu":
            covers = source.is_contiguous() and source.untyped_storage().nbytes() == num_bytes
            return source if covers else source.clone(memory_format=torch.contiguous_format)
        buffer = self._memory(num_bytes).view(source.dtype).view(source.shape)
        return self._transfer(buffer, source, source.untyped_storage()._cdata)

    def _transfer(self, copied: torch.Tensor, original: torch.Tensor, key: int) -> torch.Tensor:
        if self._buffers is not None and key in self._may_wait:
            self.copies_left.append((copied, original))
            return copied
        return copied.copy_(original, non_blocking=True)

    def _memory(self, num_bytes: int) -> torch.Tensor:
        if self._buffers is None:
            return torch.empty(num_bytes, dtype=torch.uint8)
        return self._buffers.take(num_bytes)


def _as_neox_reads_it(content: Any) -> Any:
    """Return a file's content with FusedAdam's keys."""
    if not isinstance(content, Mapping):
        return content
    if "optimizer_state_dict" in content and "ds_config" in content:
        zero = dict(content["optimizer_state_dict"])
        if isinstance(zero.get("base_optimizer_state"), Mapping):
            zero["base_optimizer_state"] = with_fused_adam_keys(zero["base_optimizer_state"])
        return {**content, "optimizer_state_dict": zero}
    optimizer = content.get("optimizer")
    if isinstance(optimizer, Mapping):
        if "param_groups" in optimizer:
            return {**content, "optimizer": with_fused_adam_keys(optimizer)}
        inner = optimizer.get("optimizer_state_dict", optimizer.get("base_optimizer_state"))
        if isinstance(inner, Mapping) and "param_groups" in inner:
            name = next(key for key, value in optimizer.items() if value is inner)
            adapted = {**optimizer, name: with_fused_adam_keys(inner)}
            return {**content, "optimizer": adapted}
    return content
