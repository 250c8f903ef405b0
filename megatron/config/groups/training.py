"""The training group: all of NeoX's training keys, declared in five parts."""

from dataclasses import dataclass

from megatron.config.groups.training_checkpoints import TrainingCheckpoints
from megatron.config.groups.training_data import TrainingData
from megatron.config.groups.training_loop import TrainingLoop
from megatron.config.groups.training_mup import TrainingMup
from megatron.config.groups.training_preferences import TrainingPreferences

__all__ = ["Training"]


@dataclass(frozen=True, kw_only=True)
class Training(TrainingData, TrainingPreferences, TrainingCheckpoints, TrainingLoop, TrainingMup):
    """Data, objective, checkpoints, the loop, and what is recomputed."""
