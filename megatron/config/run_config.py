"""The finished configuration: one frozen value."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from megatron.config.batch_geometry import BatchGeometry
from megatron.config.groups import (
    GROUPS,
    DeepspeedConfig,
    DeepspeedRunner,
    Ledger,
    Legacy,
    Logging,
    LRScheduler,
    Model,
    MoE,
    Optimizer,
    Other,
    Parallelism,
    Textgen,
    Tokenizer,
    Training,
)
from megatron.config.registry import keys
from megatron.config.topology import Topology
from megatron.config.yaml_files import Written

__all__ = ["RunConfig", "build_run_config"]

# of these the written value is a limit, or nothing at all
_ELASTIC = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Every key's value after derivation, in groups, and what follows from them.

    Attribute names inside the groups are NeoX's key names.
    """

    runner: DeepspeedRunner
    deepspeed: DeepspeedConfig
    model: Model
    moe: MoE
    lr_scheduler: LRScheduler
    optimizer: Optimizer
    tokenizer: Tokenizer
    training: Training
    parallelism: Parallelism
    logging: Logging
    text_generation: Textgen
    other: Other
    ledger: Ledger
    legacy: Legacy
    topology: Topology
    geometry: BatchGeometry
    config_files: dict[str, str]  # file name -> raw text
    written: frozenset[str]  # keys the user set, also to their default
    origins: Mapping[str, Written] = field(compare=False, repr=False)  # what was set, and where

    def get(self, name: str) -> Any:
        """Return a key's value.

        Raises:
            KeyError: there is no such key.
        """
        return getattr(getattr(self, keys()[name].group), name)

    def flat(self) -> dict[str, Any]:
        """Return every key by name: NeoX's, ours and v1.0's."""
        return {name: self.get(name) for name in keys()}

    def neox_flat(self) -> dict[str, Any]:
        """Return the keys NeoX main knows, by name."""
        return {
            name: self.get(name)
            for name, entry in keys().items()
            if not entry.is_ours and not entry.is_legacy
        }

    def non_default(self, group: str | None = None) -> dict[str, Any]:
        """Return the keys that differ from their default, of one group or of all."""
        return {
            name: value
            for name, entry in keys().items()
            if group in (None, entry.group) and (value := self.get(name)) != entry.default
        }

    def deepspeed_values(self) -> dict[str, Any]:
        """Return DeepSpeed's keys that differ from NeoX's default: what NeoX forwards."""
        return self.non_default("deepspeed")

    def origin(self, name: str) -> str:
        """Return the file a key's value was written in, or what else it is from."""
        written = self.origins.get(name)
        if written is None:
            return "default"
        if self.ledger.elastic_batch and name in _ELASTIC and written.value != self.get(name):
            return "elastic_batch"
        return written.origin

    def say(self, name: str) -> str:
        """Return ``name=value (where it was written)`` for a message."""
        text = str(self.get(name))
        return f"{name}={text if len(text) <= 60 else text[:57] + '...'} ({self.origin(name)})"


def build_run_config(
    values: Mapping[str, Any],
    *,
    written: frozenset[str],
    origins: Mapping[str, Written],
) -> RunConfig:
    """Put resolved values into groups and work out topology and geometry."""
    groups: dict[str, Any] = {
        name: group(**{item.name: values[item.name] for item in fields(group)})
        for name, group in GROUPS.items()
    }
    stages, tensor = max(1, values["pipe_parallel_size"]), values["model_parallel_size"]
    topology = Topology(
        pipeline_parallel_size=stages,
        data_parallel_size=values["global_num_gpus"] // stages // tensor,
        tensor_parallel_size=tensor,
        uses_pipeline_engine=values["is_pipe_parallel"],
    )
    geometry = BatchGeometry(
        micro_batch_size=values["train_micro_batch_size_per_gpu"],
        data_parallel_size=topology.data_parallel_size,
        gradient_accumulation_steps=values["gradient_accumulation_steps"],
    )
    return RunConfig(
        **groups,
        topology=topology,
        geometry=geometry,
        config_files=dict(values["config_files"] or {}),
        written=written,
        origins=origins,
    )
