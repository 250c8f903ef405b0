"""The model of a stored checkpoint, from the configuration that was saved with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.base.errors import CheckpointError, ConfigError
from megatron.base.torch_metadata import read_torch_metadata
from megatron.checkpoint.reshape.for_neox import NeoxWeights
from megatron.checkpoint.stored import model_states_file, read_model_facts
from megatron.config.load import load_config
from megatron.config.run_config import RunConfig
from megatron.data.tokenizers import build_tokenizer
from megatron.model.settings import ModelSettings

__all__ = ["ConfiguredModel", "configured_model"]


@dataclass(frozen=True)
class ConfiguredModel:
    """A checkpoint's configuration, and what follows from it for its tensors."""

    checkpoint: Path
    config: RunConfig
    settings: ModelSettings  # with the pinned facts
    data_parallel_size: int  # the writer's

    def for_neox(self, tensor_parallel_size: int, vocab_size: int | None) -> NeoxWeights:
        """Return what NeoX makes of the vocabulary at ``tensor_parallel_size``.

        Args:
            tensor_parallel_size: NeoX's ``model_parallel_size`` when it loads the result.
            vocab_size: ids of the tokenizer; None: those of the one in the configuration.

        Raises:
            ConfigError: the tokenizer isn't there.
        """
        return NeoxWeights.of(
            vocab_size=vocab_size or self._vocab_size(),
            divisible_by=self.config.model.make_vocab_size_divisible_by,
            tensor_parallel_size=tensor_parallel_size,
            pinned=self.settings.padded_vocab_size,
        )

    def _vocab_size(self) -> int:
        training = self.config.training
        try:
            return build_tokenizer(
                self.config.tokenizer.tokenizer_type, training.vocab_file, training.merge_file
            ).vocab_size
        except (ConfigError, OSError, ValueError) as error:
            raise ConfigError(
                f"the tokenizer in {self.checkpoint / 'configs'} cannot be opened ({error}); say "
                "how many entries it has: --vocab-size"
            ) from error


def configured_model(checkpoint: Path, config_files: Sequence[Path] = ()) -> ConfiguredModel:
    """Read what a checkpoint says of its model.

    Args:
        checkpoint: a ``global_stepN``.
        config_files: read instead of its ``configs/``.

    Raises:
        CheckpointError: it holds no configuration.
        ConfigError: the configuration cannot be used.
    """
    files = list(config_files) or sorted((checkpoint / "configs").glob("*.y*ml"))
    if not files:
        raise CheckpointError(
            f"{checkpoint} holds no configs/*.yml, and its tensors alone don't say how they are "
            "divided; name the run's configuration files: --config"
        )
    path = checkpoint / model_states_file(0)
    metadata = read_torch_metadata(path) if path.exists() else {}
    data_ranks = metadata.get("dp_world_size", 1)
    world_size = data_ranks * metadata.get("mp_world_size", 1)
    config = load_config(
        files,
        # The writer's machines are none of this tool's business.
        {"num_gpus": world_size, "hostfile": None},
        local_slots=lambda: world_size,
        environ={},
    )
    facts = read_model_facts(checkpoint, gpt_j_residual=config.model.gpt_j_residual).model
    settings = ModelSettings.from_config(config.model, config.training, facts)
    return ConfiguredModel(checkpoint, config, settings, data_ranks)
