"""What a run fixes about its model at its first checkpoint, whatever the topology later."""

from dataclasses import dataclass

from megatron.base.errors import ConfigError

__all__ = ["ModelFacts"]


@dataclass(frozen=True)
class ModelFacts:
    """Two numbers that NeoX derives from the tensor-parallel size and we pin (design §5)."""

    padded_vocab_size: int  # rows of the embedding and of the output matrix
    tp_bias_multiplicity: int = 1
    """How often the forward pass counts each replicated bias under ``gpt_j_residual``.

    NeoX adds those biases once per tensor rank there, so a model it trained at tensor-parallel
    size t computes with t times the bias its files hold.
    """

    def __post_init__(self) -> None:
        if self.padded_vocab_size < 1:
            raise ValueError(f"padded_vocab_size must be positive, got {self.padded_vocab_size}")
        if self.tp_bias_multiplicity < 1:
            raise ValueError(
                f"tp_bias_multiplicity must be positive, got {self.tp_bias_multiplicity}"
            )

    @classmethod
    def of_new_run(
        cls,
        *,
        padded_vocab_size: int,
        tensor_parallel_size: int,
        gpt_j_residual: bool,
        configured_multiplicity: int | None = None,
    ) -> "ModelFacts":
        """Return the facts of a run that loads no checkpoint.

        Args:
            padded_vocab_size: NeoX's, at the size the run begins with.
            tensor_parallel_size: the size the run begins with.
            gpt_j_residual: whether attention and MLP share one all-reduce.
            configured_multiplicity: the key ``tp_bias_multiplicity``, if set.

        Raises:
            ConfigError: a multiplicity other than 1 is configured for a model without
                ``gpt_j_residual``.
        """
        if not gpt_j_residual:
            if configured_multiplicity not in (None, 1):
                raise ConfigError(
                    f"tp_bias_multiplicity={configured_multiplicity} needs gpt_j_residual: true; "
                    "without it every bias counts once; remove the key"
                )
            return cls(padded_vocab_size)
        return cls(padded_vocab_size, configured_multiplicity or tensor_parallel_size)
