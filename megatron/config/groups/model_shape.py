"""Model keys: sizes, residuals, vocabulary."""

from dataclasses import dataclass
from typing import Literal

from megatron.config.declare import WORKS, key, no_effect

__all__ = ["ModelShape"]

_UNUSED = no_effect("nothing reads it, in NeoX neither")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model and how its blocks are put together."""

    precision: Literal["fp16", "fp32", "bfloat16"] | None = key(None, outcome=WORKS)
    """Type of the parameters. Unset: what the ``fp16`` or ``bf16`` block enables, else fp32."""

    num_layers: int | None = key(None, unit="blocks", minimum=1, outcome=WORKS)
    """Transformer blocks. Required."""

    hidden_size: int | None = key(None, minimum=1, outcome=WORKS)
    """Width of the residual stream; a multiple of ``num_attention_heads``. Required."""

    intermediate_size: int | None = key(None, tier=2, minimum=1, outcome=WORKS)
    """Width of the MLP before gating takes its third (a Llama's is 3 x its real width). Unset:
    ``expansion_factor`` x hidden size, else 4 x. Excludes ``expansion_factor``."""

    mlp_multiple_of: int | None = key(1, tier=2, minimum=1, outcome=WORKS)
    """MLP widths are rounded up to a multiple of this."""

    expansion_factor: float | None = key(None, tier=2, minimum=0, outcome=WORKS)
    """Width of the MLP as a multiple of ``hidden_size``. Unset: see ``intermediate_size``."""

    num_attention_heads: int | None = key(None, unit="heads", minimum=1, outcome=WORKS)
    """Query heads; a multiple of ``model_parallel_size``. Required."""

    num_kv_heads: int | None = key(None, tier=2, unit="heads", minimum=1, outcome=WORKS)
    """Key and value heads, which several query heads share. Must divide ``num_attention_heads``.
    Unset: as many as query heads."""

    seq_length: int | None = key(None, unit="tokens", minimum=1, outcome=WORKS)
    """Tokens the model sees at a time; a training sample has one more, so that the last one has a
    target."""

    max_position_embeddings: int | None = key(None, unit="tokens", minimum=1, outcome=WORKS)
    """Rows of the learned position table; at least ``seq_length``. Required with other position
    schemes too."""

    no_weight_tying: bool | None = key(False, outcome=WORKS)
    """Give the output layer a matrix of its own instead of the embedding's."""

    num_unique_layers: int | None = key(None, tier=3, minimum=1, outcome=_UNUSED)
    """Meant for layers that share parameters; only checked to divide ``num_layers``."""

    param_sharing_style: str | None = key("grouped", tier=3, outcome=_UNUSED)
    """Meant for layers that share parameters."""

    make_vocab_size_divisible_by: int | None = key(128, unit="tokens", minimum=1, outcome=WORKS)
    """The embedding gets a multiple of this x ``model_parallel_size`` rows."""

    activation: (
        Literal[
            "gelu",
            "geglu",
            "relu",
            "softsign",
            "swish",
            "mish",
            "silu",
            "reglu",
            "swiglu",
            "bilinear",
            "glu",
        ]
        | None
    ) = key("gelu", outcome=WORKS)
    """Function inside the MLP. ``geglu``, ``reglu``, ``swiglu``, ``bilinear``, ``glu`` are gated:
    one half of the first linear's output scales the other."""

    gpt_j_residual: bool | None = key(False, outcome=WORKS)
    """Attention and MLP both read the block's input and are added together, rather than one after
    the other."""

    gpt_j_tied: bool | None = key(False, outcome=WORKS)
    """With ``gpt_j_residual``: attention and MLP share one norm. Without it, no effect."""

    output_layer_parallelism: Literal["column"] | None = key("column", outcome=WORKS)
    """How the output layer is split over tensor ranks; there is one way."""
