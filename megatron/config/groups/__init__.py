"""Every configuration key, one frozen dataclass per NeoX group, plus our own and v1.0's.

An attribute of ``RunConfig`` holds each group. A key says its type, default, unit, limits, other
names and outcome at launch (see ``megatron.config.declare``); the text below it is its
documentation, from which ``configs/neox_arguments.md`` is generated.
"""

from megatron.config.groups.deepspeed import DeepspeedConfig
from megatron.config.groups.ledger import Ledger
from megatron.config.groups.legacy import Legacy
from megatron.config.groups.logging import Logging
from megatron.config.groups.lr_scheduler import LRScheduler
from megatron.config.groups.model import Model
from megatron.config.groups.moe import MoE
from megatron.config.groups.optimizer import Optimizer
from megatron.config.groups.other import Other
from megatron.config.groups.parallelism import Parallelism
from megatron.config.groups.runner import DeepspeedRunner
from megatron.config.groups.text_generation import Textgen
from megatron.config.groups.tokenizer import Tokenizer
from megatron.config.groups.training import Training

__all__ = [
    "GROUPS",
    "DeepspeedConfig",
    "DeepspeedRunner",
    "LRScheduler",
    "Ledger",
    "Legacy",
    "Logging",
    "MoE",
    "Model",
    "Optimizer",
    "Other",
    "Parallelism",
    "Textgen",
    "Tokenizer",
    "Training",
]

# Attribute of RunConfig -> group, in NeoX's order; ours and v1.0's come last.
GROUPS: dict[str, type] = {
    "runner": DeepspeedRunner,
    "deepspeed": DeepspeedConfig,
    "model": Model,
    "moe": MoE,
    "lr_scheduler": LRScheduler,
    "optimizer": Optimizer,
    "tokenizer": Tokenizer,
    "training": Training,
    "parallelism": Parallelism,
    "logging": Logging,
    "text_generation": Textgen,
    "other": Other,
    "ledger": Ledger,
    "legacy": Legacy,
}
