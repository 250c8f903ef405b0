"""Weights as NeoX itself reads them, which pins neither vocabulary nor bias multiplicity.

NeoX pads the vocabulary for its own tensor-parallel size t, and under gpt_j_residual it counts each
replicated bias t times. A model that was trained with m times its biases therefore needs files with
b * m / t (design §5).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron.base.errors import ConfigError
from megatron.checkpoint.weights import rank_part
from megatron.data.tokenizers import padded_vocab_size
from megatron.model.settings import ModelSettings

__all__ = ["NeoxWeights"]

_VOCABULARY = ("word_embeddings.weight", "final_linear.weight")
_REPLICATED_BIASES = ("attention.dense.bias", "mlp.linear2.bias")


@dataclass(frozen=True)
class NeoxWeights:
    """What NeoX computes at the tensor-parallel size it will run at."""

    padded_vocab_size: int
    tensor_parallel_size: int

    @classmethod
    def of(
        cls, *, vocab_size: int, divisible_by: int, tensor_parallel_size: int, pinned: int
    ) -> "NeoxWeights":
        """Return what NeoX makes of a vocabulary.

        Args:
            vocab_size: ids the tokenizer can give.
            divisible_by: NeoX's ``make_vocab_size_divisible_by``.
            tensor_parallel_size: NeoX's ``model_parallel_size`` when it loads the result.
            pinned: rows that the model has.

        Raises:
            ConfigError: the tokenizer has more entries than the model has rows.
        """
        if vocab_size > pinned:
            raise ConfigError(
                f"the tokenizer has {vocab_size} entries, but the model has {pinned} (padded) "
                "rows; name the size of the tokenizer it was trained with: --vocab-size"
            )
        rows = padded_vocab_size(vocab_size, divisible_by, tensor_parallel_size)
        return cls(rows, tensor_parallel_size)

    def notices(self, settings: ModelSettings) -> list[str]:
        """Return what a user should know about the difference to ``settings``."""
        size = self.tensor_parallel_size
        found = [
            "weights alone, for NeoX: load them there with finetune: true, or with no_load_optim "
            "and no_load_rng"
        ]
        difference = self.padded_vocab_size - settings.padded_vocab_size
        if difference > 0:
            found.append(
                f"NeoX pads the vocabulary to {self.padded_vocab_size} rows at model_parallel_size "
                f"{size}: {difference} rows of zeros are added. NeoX gives them logits of 0, so "
                "its losses are a little higher than ours"
            )
        elif difference < 0:
            found.append(
                f"NeoX pads the vocabulary to {self.padded_vocab_size} rows at model_parallel_size "
                f"{size}: {-difference} trained rows of padding are cut off, so its losses are a "
                "little lower than ours"
            )
        if settings.gpt_j_residual and settings.tp_bias_multiplicity != size:
            found.append(
                f"biases of attention.dense and mlp.linear2 are multiplied by "
                f"{settings.tp_bias_multiplicity}/{size}: NeoX counts them {size} times under "
                "gpt_j_residual"
            )
        return found

    def shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a tensor rank's part, given that with the pinned vocabulary."""
        if name in _VOCABULARY:
            return (self.padded_vocab_size // self.tensor_parallel_size, *shape[1:])
        return tuple(shape)

    def part(
        self, name: str, parts: Sequence[torch.Tensor], *, rank: int, settings: ModelSettings
    ) -> torch.Tensor:
        """Return tensor rank ``rank``'s part of a tensor stored in ``parts``."""
        size = self.tensor_parallel_size
        if name in _VOCABULARY:
            whole = rank_part(name, parts, size=1, rank=0, settings=settings)
            rows = self.padded_vocab_size // size
            kept = whole[rank * rows : (rank + 1) * rows]
            missing = kept.new_zeros((rows - len(kept), *kept.shape[1:]))
            return torch.cat([kept, missing]) if len(missing) else kept
        part = rank_part(name, parts, size=size, rank=rank, settings=settings)
        if settings.gpt_j_residual and name in _REPLICATED_BIASES:
            if settings.tp_bias_multiplicity == size:
                return part
            return (part.float() * settings.tp_bias_multiplicity / size).to(part.dtype)
        return part
