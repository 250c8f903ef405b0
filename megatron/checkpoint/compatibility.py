"""Whether a stored checkpoint is of this run's model, topology and parameter order."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.base.errors import CheckpointError
from megatron.checkpoint.stored import StoredCheckpoint
from megatron.config.topology import Topology
from megatron.model.settings import ModelSettings

__all__ = [
    "MODEL_ARGUMENTS",
    "WEIGHTS_ALONE",
    "AdamStepRule",
    "LoadSettings",
    "model_rank",
    "require_same_arguments",
    "require_same_parameters",
    "topology_difference",
]

# The keys NeoX stores as `args`, and compares one by one when it loads.
MODEL_ARGUMENTS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "make_vocab_size_divisible_by",
    "padded_vocab_size",
    "tokenizer_type",
    "model_parallel_size",
)
WEIGHTS_ALONE = (
    "to load the weights alone set no_load_optim: true (go on from this step) or finetune: true "
    "(a new run)"
)

AdamStepRule = Literal["continue", "neox-v1-resume"]
"""Where NeoX v1.0 didn't store Adam's step: count on, or from 1 again as v1.0 itself does."""


@dataclass(frozen=True)
class LoadSettings:
    """What a launch expects of the checkpoint it loads."""

    model: ModelSettings  # with the checkpoint's pinned facts
    model_arguments: Mapping[str, Any]  # the eight values NeoX compares, as this run saves them
    topology: Topology
    rank: int  # global rank of this process
    is_verified: bool = False  # the files' digests or checksums were just checked
    adam_step: AdamStepRule = "continue"  # of what NeoX v1.0 wrote without Adam's step

    def open(self, directory: Path) -> StoredCheckpoint:
        """Return the checkpoint in ``directory``, read as far as needed.

        Raises:
            CheckpointError: it is not a checkpoint.
        """
        return StoredCheckpoint(directory, is_verified=self.is_verified)

    @property
    def tensor_rank(self) -> int:
        """This rank's place among the ranks that share every layer."""
        return self.topology.coordinates(self.rank).tensor_parallel_rank


def model_rank(settings: LoadSettings) -> int:
    """Return XX of this rank's ``mp_rank_XX`` files."""
    return settings.topology.model_file_rank(settings.topology.coordinates(settings.rank))


def topology_difference(stored: StoredCheckpoint, topology: Topology) -> str | None:
    """Return how the writer's topology differs from this run's, None if it doesn't."""
    if not stored.model_ranks:
        return "it holds weights alone"
    metadata = stored.model_states(stored.model_ranks[0])
    tensor = stored.tensor_parallel_size
    stages = metadata.get("mp_world_size", len(stored.model_ranks)) // tensor
    written = (
        stages if stored.has_layer_files else 0,
        tensor,
        metadata.get("dp_world_size"),
    )
    live = (
        topology.pipeline_parallel_size if topology.uses_pipeline_engine else 0,
        topology.tensor_parallel_size,
        topology.data_parallel_size,
    )
    if written == live:
        return None

    def described(sizes: tuple[Any, ...]) -> str:
        return "pipe_parallel_size {}, model_parallel_size {}, data parallel {}".format(*sizes)

    return f"it was written at {described(written)}, this launch has {described(live)}"


def require_same_arguments(
    stored: StoredCheckpoint, settings: LoadSettings, *, but: tuple[str, ...] = ()
) -> None:
    """Compare what NeoX compares, except the keys in ``but``.

    Raises:
        CheckpointError: names every key with both values.
    """
    different = [
        f"{key} is {value!r} in the checkpoint and {settings.model_arguments[key]!r} here"
        for key, value in stored.model_arguments.items()
        if key not in but
        and key in settings.model_arguments
        and value != settings.model_arguments[key]
    ]
    if different:
        raise CheckpointError(
            f"{stored.directory} holds another model: {'; '.join(different)}. Change the "
            "configuration to the checkpoint's values"
        )


def require_same_parameters(engine: Any, metadata: Mapping[str, Any], *, source: str) -> None:
    """Check names, order and shapes of the parameters in ZeRO's flat vectors.

    Raises:
        CheckpointError: names the first that differs.
    """
    stored = metadata.get("param_shapes")
    if stored is None:
        return
    live = engine._get_zero_param_shapes()
    for index, (old, new) in enumerate(zip(stored, live, strict=False)):
        for old_item, new_item in zip(old.items(), new.items(), strict=False):
            if (old_item[0], tuple(old_item[1])) != (new_item[0], tuple(new_item[1])):
                raise CheckpointError(
                    f"{source}: group {index} holds {old_item[0]} {tuple(old_item[1])} where this "
                    f"model has {new_item[0]} {tuple(new_item[1])}: layers are divided over the "
                    f"stages in another way, or the model is another one; {WEIGHTS_ALONE}"
                )
    if [len(group) for group in stored] != [len(group) for group in live]:
        raise CheckpointError(
            f"{source} holds groups of {[len(group) for group in stored]} parameters, this model "
            f"has {[len(group) for group in live]}; {WEIGHTS_ALONE}"
        )
