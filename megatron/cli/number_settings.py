"""Keys that decide what a step computes from its samples, compared when a run goes on.

NeoX compares eight values that shape the parameters, and goes on with any other without a word.
"""

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["number_settings"]

_MODEL = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "intermediate_size"),
    *("expansion_factor", "mlp_multiple_of", "max_position_embeddings", "attention_config"),
    *("pos_emb", "rotary_pct", "rotary_emb_base", "opt_pos_emb_offset", "no_weight_tying"),
    *("norm", "layernorm_epsilon", "rms_norm_epsilon", "activation", "bias_gelu_fusion"),
    *("gpt_j_residual", "gpt_j_tied", "use_bias_in_norms", "use_bias_in_attn_linear"),
    *("use_bias_in_mlp", "apply_query_key_layer_scaling", "eod_mask_loss", "neox_version"),
)
_TRAINING = (
    *("precision", "fp16", "bf16", "data_types", "optimizer", "weight_decay"),
    *("gradient_clipping", "hidden_dropout", "attention_dropout"),
    *("lr_decay_style", "lr_decay_iters", "lr_decay_fraction", "min_lr", "warmup"),
)


def number_settings(flat: Mapping[str, Any]) -> dict[str, str | int | float]:
    """Return the keys that act on numbers, as far as ``flat`` has them and they are set.

    Lists and dictionaries become JSON, so that those of an attempt's file compare with live ones.

    Args:
        flat: every key.
    """
    values: dict[str, str | int | float] = {}
    for name in (*_MODEL, *_TRAINING):
        value = flat.get(name)
        plain = isinstance(value, str | int | float)
        values[name] = value if plain else json.dumps(value, sort_keys=True, default=str)
    return values
