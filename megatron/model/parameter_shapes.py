"""Names and shapes of a model's parameters on one tensor rank, without building it."""

from collections.abc import Iterator

from megatron.model.settings import FIRST_BLOCK, ModelSettings

__all__ = ["Shapes", "parameter_shapes"]

Shapes = dict[str, tuple[int, ...]]
"""Parameter name, as in a layer file -> shape."""


def parameter_shapes(
    settings: ModelSettings, *, tensor_parallel_size: int = 1
) -> dict[int, Shapes]:
    """Return the parameters of every numbered layer that has some (spec/model.md §1, §2).

    A tied head has none of its own; relative positions stand under every block, which share them.

    Args:
        settings: the model.
        tensor_parallel_size: how many ranks hold a part each; sizes must divide, but the
            vocabulary's, which is rounded up.
    """
    size = tensor_parallel_size
    rows = -(-settings.padded_vocab_size // size)
    width = settings.hidden_size
    embedding: Shapes = {"word_embeddings.weight": (rows, width)}
    if settings.pos_emb == "learned":
        embedding["position_embeddings.weight"] = (settings.max_position_embeddings, width)
    block = dict(_block(settings, size))
    after_blocks = FIRST_BLOCK + settings.num_layers
    layers = {0: embedding}
    layers |= dict.fromkeys(range(FIRST_BLOCK, after_blocks), block)
    if norm := dict(_norm("norm", settings, (width,))):
        layers[after_blocks + 1] = norm
    if not settings.tied_embedding:
        layers[after_blocks + 2] = {"final_linear.weight": (rows, width)}
    return layers


def _block(settings: ModelSettings, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, heads = settings.hidden_size, settings.num_attention_heads // size
    fused = (settings.num_attention_heads + 2 * settings.num_kv_heads) * settings.head_size // size
    up, down = settings.mlp_up_size // size, settings.mlp_down_size // size
    yield from _norm("input_layernorm", settings, (width,))
    if settings.normalises_queries_and_keys:
        yield from _norm("attention.qk_layernorm", settings, (heads, settings.head_size))
    yield from _linear("attention.query_key_value", (fused, width), bias=settings.bias_in_attention)
    if settings.pos_emb == "rpe":
        yield "attention.rpe.weight", (settings.rpe_num_buckets, heads)
    yield from _linear("attention.dense", (width, width // size), bias=settings.bias_in_attention)
    yield from _norm("post_attention_layernorm", settings, (width,))
    yield from _linear("mlp.linear1", (up, width), bias=settings.bias_in_mlp)
    yield from _linear("mlp.linear2", (width, down), bias=settings.bias_in_mlp)


def _linear(
    name: str, shape: tuple[int, int], *, bias: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _norm(
    name: str, settings: ModelSettings, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    if settings.norm == "rmsnorm":
        yield f"{name}.scale", shape
    elif settings.norm == "scalenorm":
        yield f"{name}.g", (1,)
    elif settings.norm == "layernorm":
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape
