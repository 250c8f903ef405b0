"""Model keys: norms, biases, initial weights, and kernels that leave the numbers alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.config.declare import WORKS, Outcome, key, no_effect, only, refused, same_numbers

__all__ = ["ModelNumerics"]

_ONE_KERNEL = same_numbers("one kernel serves both settings")

InitMethod = Literal[
    "normal",
    "scaled_normal",
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
    "wang_init",
    "small_init",
    "single_residual_scaled_normal",
]


def _tunes_scalenorm(value: Any, keys: Mapping[str, Any]) -> Outcome:
    """no effect without norm: scalenorm."""
    if keys["norm"] == "scalenorm":
        return WORKS
    return no_effect("it only tunes norm: scalenorm, which is off")


@dataclass(frozen=True, kw_only=True)
class ModelNumerics:
    """Everything that acts on the numbers inside a block, and fused kernels."""

    norm: (
        Literal[
            "layernorm",
            "rmsnorm",
            "non_parametric_layernorm",
            "scalenorm",
            "te_rmsnorm",
            "te_layernorm",
        ]
        | None
    ) = key(
        "layernorm",
        outcome=only(
            "layernorm",
            "rmsnorm",
            "scalenorm",
            "non_parametric_layernorm",
            advice="use layernorm or rmsnorm, which have the same maths",
        ),
    )
    """Kind of every norm."""

    layernorm_fusion: bool | None = key(False, tier=2, outcome=_ONE_KERNEL)
    """Use a fused LayerNorm."""

    rmsnorm_fusion: bool | None = key(False, tier=2, outcome=_ONE_KERNEL)
    """Use a fused RMSNorm."""

    layernorm_epsilon: float | None = key(1e-5, minimum=0, outcome=WORKS)
    """Added to the variance in LayerNorm."""

    rms_norm_epsilon: float | None = key(1e-8, tier=2, minimum=0, outcome=WORKS)
    """Added to the mean square in RMSNorm. (Llama's checkpoints want 1e-5 or 1e-6.)"""

    scalenorm_epsilon: float | None = key(1e-8, tier=2, minimum=0, outcome=_tunes_scalenorm)
    """Least length ScaleNorm divides by."""

    use_flashattn_swiglu: bool | None = key(False, tier=3, outcome=_ONE_KERNEL)
    """Use flash-attention's SwiGLU."""

    scaled_upper_triang_masked_softmax_fusion: bool | None = key(False, outcome=_ONE_KERNEL)
    """Use a fused causal softmax."""

    scaled_masked_softmax_fusion: bool | None = key(False, tier=2, outcome=_ONE_KERNEL)
    """Use a fused softmax with a general mask."""

    bias_gelu_fusion: bool | None = key(False, outcome=WORKS)
    """GELU by its tanh formula, fused with the bias in NeoX. This changes numbers: without it GELU
    is the exact one. Pythia was trained with it."""

    bias_dropout_fusion: bool | None = key(False, tier=2, outcome=_ONE_KERNEL)
    """Fuse bias, dropout and residual."""

    rope_fusion: bool | None = key(False, tier=2, outcome=_ONE_KERNEL)
    """Use a fused rotary embedding."""

    fused_kernels_build_path: str | None = key(
        None, tier=2, outcome=no_effect("there are no kernels to compile at run time")
    )
    """Folder for NeoX's compiled kernels."""

    fp16_lm_cross_entropy: bool | None = key(False, tier=2, outcome=refused("set it to false"))
    """Compute the loss in fp16 rather than fp32. Needs precision fp16."""

    init_method_std: float | None = key(0.02, minimum=0, outcome=WORKS)
    """Standard deviation of the ``normal`` family of initial weights."""

    init_method: InitMethod | None = key("normal", outcome=WORKS)
    """Initial weights of query-key-value, the MLP's first linear, embeddings and output layer."""

    output_layer_init_method: InitMethod | None = key("scaled_normal", outcome=WORKS)
    """Initial weights of the two linears that write to the residual stream."""

    use_cpu_initialization: bool | None = key(
        False, tier=2, outcome=same_numbers("weights are always drawn so")
    )
    """Draw every whole matrix on the CPU and cut it, so that initial weights don't depend on
    ``model_parallel_size``."""

    use_bias_in_norms: bool | None = key(
        True, tier=2, outcome=no_effect("the norms keep their bias, as in NeoX")
    )
    """Meant to drop the bias of norms."""

    use_bias_in_attn_linear: bool | None = key(True, tier=2, outcome=WORKS)
    """Biases on query-key-value and attention's output."""

    use_bias_in_mlp: bool | None = key(True, tier=2, outcome=WORKS)
    """Biases on the MLP's linears."""
