"""Model keys of variants: gMLP, Mamba, RWKV, soft prompts, TransformerEngine, online RL."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron.config.declare import key, part_of, refused

__all__ = ["ModelVariants"]

_TUNES_MAMBA = part_of("attention_config: mamba")
_TUNES_RWKV = part_of("attention_config: rwkv")
_TUNES_FP8 = part_of("TransformerEngine's FP8")
_TUNES_ONLINE = part_of("dataset_impl: online")
_TE = refused("set it to false; the ordinary layers have the same maths")


@dataclass(frozen=True, kw_only=True)
class ModelVariants:
    """Other architectures and other providers of the same layers."""

    gmlp_attn_dim: int | None = key(
        64, tier=3, minimum=1, outcome=part_of("attention_config: gmlp or amlp")
    )
    """Width of gMLP's small attention."""

    soft_prompt_tuning: dict[str, Any] | None = key(
        None, tier=3, outcome=refused("leave it out (NeoX's doesn't run either)")
    )
    """Train a soft prompt: ``enabled``, ``n_tokens``, ``init_string``, ``init_range``."""

    mamba_selective_scan_fusion: bool | None = key(False, tier=3, outcome=_TUNES_MAMBA)
    """Mamba: fused selective scan."""

    mamba_causal_conv_fusion: bool | None = key(False, tier=3, outcome=_TUNES_MAMBA)
    """Mamba: fused causal convolution."""

    mamba_inner_func_fusion: bool | None = key(False, tier=3, outcome=_TUNES_MAMBA)
    """Mamba: one kernel for the whole inner function."""

    mamba_selective_fp32_params: bool | None = key(True, tier=3, outcome=_TUNES_MAMBA)
    """Mamba: keep A and D in fp32."""

    mamba_use_bias_in_conv: bool | None = key(True, tier=3, outcome=_TUNES_MAMBA)
    """Mamba: bias on the convolution."""

    mamba_use_bias_in_linears: bool | None = key(False, tier=3, outcome=_TUNES_MAMBA)
    """Mamba: biases on the linears."""

    serve_model_weights: bool | None = key(False, tier=3, outcome=refused("set it to false"))
    """Online RL: offer the weights to inference servers."""

    weight_server_port: int | list[int] | None = key(
        6000, tier=3, outcome=part_of("serve_model_weights")
    )
    """Online RL: port, or one per rank, at which weights are offered."""

    online_dataserver_ips: str | list[str] | None = key("localhost", tier=3, outcome=_TUNES_ONLINE)
    """Online RL: hosts that give samples."""

    online_dataserver_ports: int | list[int] | None = key(10000, tier=3, outcome=_TUNES_ONLINE)
    """Online RL: their ports."""

    te_columnparallel: bool | None = key(False, tier=3, outcome=_TE)
    """TransformerEngine's column-parallel linear."""

    te_rowparallel: bool | None = key(False, tier=3, outcome=_TE)
    """TransformerEngine's row-parallel linear."""

    te_layernorm_mlp: bool | None = key(False, tier=3, outcome=_TE)
    """TransformerEngine's norm and MLP in one."""

    te_mha: bool | None = key(False, tier=3, outcome=_TE)
    """TransformerEngine's attention."""

    te_fp8_format: Literal["e4m3", "hybrid"] | None = key("hybrid", tier=3, outcome=_TUNES_FP8)
    """FP8 format forward, and backward for ``hybrid``'s e5m2."""

    te_fp8_wgrad: bool | None = key(True, tier=3, outcome=_TUNES_FP8)
    """FP8 for weight gradients too."""

    te_fp8_amax_history_len: int | None = key(
        1, tier=3, unit="steps", minimum=1, outcome=_TUNES_FP8
    )
    """How many steps FP8's scaling looks back."""

    te_fp8_amax_compute_algo: str | None = key("most_recent", tier=3, outcome=_TUNES_FP8)
    """How FP8's scaling is worked out from them."""

    te_fp8_margin: int | None = key(0, tier=3, outcome=_TUNES_FP8)
    """Safety margin of FP8's scaling, in powers of two."""

    te_fp8_mha: bool | None = key(False, tier=3, outcome=refused("set it to false"))
    """FP8 inside attention."""

    dim_att: int | None = key(None, tier=3, minimum=1, outcome=_TUNES_RWKV)
    """RWKV: width of time mixing. Unset: ``hidden_size``."""

    head_size: int | None = key(None, tier=3, minimum=1, outcome=_TUNES_RWKV)
    """RWKV: width of a head."""

    ffn_dim: int | None = key(None, tier=3, minimum=1, outcome=_TUNES_RWKV)
    """RWKV: width of channel mixing."""
