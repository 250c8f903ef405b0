"""What tensors are called in a NeoX layer and in ``GPTNeoXForCausalLM``, and their shapes.

Both keep query, key and value of a head together, so nothing is permuted.
"""

import re
from collections.abc import Iterator

from megatron.model.settings import ModelSettings

__all__ = ["OLD_HEAD", "TensorKey", "hub_names", "is_computed", "is_counted_often", "whole_shapes"]

TensorKey = tuple[int, str]
"""NeoX's layer number and the name within the layer."""

_EMBEDDING = "gpt_neox.embed_in.weight"
_HEAD = "embed_out.weight"
OLD_HEAD = ("lm_head.weight",)
"""Other names of the output matrix: transformers 5 has it in memory so, some files too."""

_COUNTED_OFTEN = ("attention.dense.bias", "mlp.linear2.bias")
# Buffers that files of older releases of transformers hold.
_COMPUTED = re.compile(r".*\.(attention\.(masked_)?bias|rotary_emb\.inv_freq)")


def hub_names(settings: ModelSettings) -> dict[TensorKey, str]:
    """Return Hugging Face's name of every tensor, in the order of NeoX's layers and files."""
    names = {(0, "word_embeddings.weight"): _EMBEDDING}
    for block in range(settings.num_layers):
        for name in _names_in_block(settings):
            theirs = name.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h")
            names[block + 2, name] = f"gpt_neox.layers.{block}.{theirs}"
    last = settings.num_layers + 3
    for kind in ("weight", "bias"):
        names[last, f"norm.{kind}"] = f"gpt_neox.final_layer_norm.{kind}"
    if not settings.tied_embedding:
        names[last + 1, "final_linear.weight"] = _HEAD
    return names


def whole_shapes(settings: ModelSettings) -> dict[TensorKey, tuple[int, ...]]:
    """Return the shape of every tensor at tensor-parallel size 1, in the same order."""
    width = settings.hidden_size
    rows = {
        "word_embeddings": (settings.padded_vocab_size, width),
        "final_linear": (settings.padded_vocab_size, width),
        "query_key_value": (3 * width, width),
        "dense": (width, width),
        "linear1": (settings.mlp_up_size, width),
        "linear2": (width, settings.mlp_down_size),
    }
    shapes: dict[TensorKey, tuple[int, ...]] = {}
    for layer, name in hub_names(settings):
        module, kind = name.split(".")[-2:]
        matrix = rows.get(module)
        if matrix is None:
            shapes[layer, name] = (width,)
        else:
            shapes[layer, name] = matrix if kind == "weight" else matrix[:1]
    return shapes


def is_computed(name: str) -> bool:
    """Whether Hugging Face's tensor called ``name`` is no parameter, but computed now."""
    return _COMPUTED.fullmatch(name) is not None


def is_counted_often(name: str, settings: ModelSettings) -> bool:
    """Whether NeoX counts the tensor once per tensor rank of the run it comes from."""
    return settings.gpt_j_residual and name in _COUNTED_OFTEN


def _names_in_block(settings: ModelSettings) -> Iterator[str]:
    has_bias = {
        "input_layernorm": True,
        "attention.query_key_value": settings.bias_in_attention,
        "attention.dense": settings.bias_in_attention,
        "post_attention_layernorm": True,
        "mlp.linear1": settings.bias_in_mlp,
        "mlp.linear2": settings.bias_in_mlp,
    }
    for module, with_bias in has_bias.items():
        yield f"{module}.weight"
        if with_bias:
            yield f"{module}.bias"
