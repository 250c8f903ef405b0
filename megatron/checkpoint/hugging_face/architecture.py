"""``config.json`` of ``GPTNeoXForCausalLM``: what it says of the model, in our words and back."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.base.errors import CheckpointError, ConfigError
from megatron.model.settings import Activation, ModelSettings

__all__ = ["HIDDEN_ACTS", "Architecture", "hub_config", "neox_keys", "read_architecture"]

_CLASS = "GPTNeoXForCausalLM"
_MODEL_TYPE = "gpt_neox"
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
# Transformers' where config.json doesn't say; shapes it has to say.
_DEFAULTS = {
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "initializer_range": 0.02,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
_ROTARY_PCT, _ROTARY_BASE = 0.25, 10000
HIDDEN_ACTS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Transformers' activations that we have; NeoX-20B's config.json says gelu_fast."""

_WRITTEN_ACTS: Mapping[Activation, str] = {"gelu": "gelu", "gelu_tanh": "gelu_fast"}


@dataclass(frozen=True)
class Architecture:
    """A model as its ``config.json`` describes it."""

    settings: ModelSettings
    init_std: float
    stored_dtype: str | None  # "float16"; None: it doesn't say


def read_architecture(
    config: Mapping[str, Any], *, source: str, bias_multiplicity: int = 1
) -> Architecture:
    """Return the model that a ``config.json`` describes.

    Args:
        config: its content.
        source: what the message calls it.
        bias_multiplicity: how often the biases of attention and MLP will be counted (design §5).

    Raises:
        CheckpointError: it is another architecture, or something in it has no counterpart here.
        ConfigError: the sizes contradict each other.
    """
    problems = [*_other_model(config), *_bad_sizes(config)]
    if not problems:
        problems = list(_unknown_parts(config))
    if problems:
        raise CheckpointError(f"{source} can't be converted: {'; '.join(problems)}")
    value = {**_DEFAULTS, **{name: one for name, one in config.items() if one is not None}}
    width, heads = value["hidden_size"], value["num_attention_heads"]
    pct, base = _rotary(config)
    try:
        settings = ModelSettings(
            num_layers=value["num_hidden_layers"],
            hidden_size=width,
            num_attention_heads=heads,
            num_kv_heads=heads,
            seq_length=value["max_position_embeddings"],
            max_position_embeddings=value["max_position_embeddings"],
            padded_vocab_size=value["vocab_size"],
            tp_bias_multiplicity=bias_multiplicity,
            rotary_dims=int(width // heads * pct),
            rotary_base=float(base),
            norm_epsilon=float(value["layer_norm_eps"]),
            activation=HIDDEN_ACTS[value["hidden_act"]],
            mlp_up_size=value["intermediate_size"],
            mlp_down_size=value["intermediate_size"],
            gpt_j_residual=bool(value["use_parallel_residual"]),
            tied_embedding=bool(value["tie_word_embeddings"]),
            bias_in_attention=bool(value["attention_bias"]),
            hidden_dropout=float(value["hidden_dropout"]),
            attention_dropout=float(value["attention_dropout"]),
        )
    except ConfigError as error:
        raise ConfigError(*(f"{source}: {problem}" for problem in error.problems)) from error
    stored = config.get("torch_dtype", config.get("dtype"))
    return Architecture(
        settings,
        init_std=float(value["initializer_range"]),
        stored_dtype=stored if isinstance(stored, str) else None,
    )


def hub_config(
    settings: ModelSettings,
    *,
    vocab_size: int,
    dtype: str,
    init_std: float,
    end_of_document: int | None,
    hidden_act: str | None = None,
) -> dict[str, Any]:
    """Return the ``config.json`` of a model.

    Args:
        settings: the model.
        vocab_size: rows that are written.
        dtype: of the weights, "float16".
        init_std: NeoX's init_method_std.
        end_of_document: id of the token that begins and ends texts, if known.
        hidden_act: written instead of what computes as the model does.

    Raises:
        ConfigError: ``GPTNeoXForCausalLM`` can't express the model; names what it lacks.
    """
    problems = list(_inexpressible(settings))
    if problems:
        raise ConfigError(*(f"{_CLASS} cannot express {problem}" for problem in problems))
    pct = _fraction(settings.rotary_dims, settings.head_size)
    base = _integral(settings.rotary_base)
    return {
        "architectures": [_CLASS],
        "attention_bias": settings.bias_in_attention,
        "attention_dropout": settings.attention_dropout,
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "hidden_act": hidden_act or _WRITTEN_ACTS[settings.activation],
        "hidden_dropout": settings.hidden_dropout,
        "hidden_size": settings.hidden_size,
        "initializer_range": init_std,
        "intermediate_size": settings.mlp_up_size,
        "layer_norm_eps": settings.norm_epsilon,
        "max_position_embeddings": settings.max_position_embeddings,
        "model_type": _MODEL_TYPE,
        "num_attention_heads": settings.num_attention_heads,
        "num_hidden_layers": settings.num_layers,
        # as transformers 4 spells it, and below as transformers 5 does
        "rotary_emb_base": base,
        "rotary_pct": pct,
        "rope_parameters": {
            "partial_rotary_factor": pct,
            "rope_theta": float(base),
            "rope_type": "default",
        },
        "tie_word_embeddings": settings.tied_embedding,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_parallel_residual": settings.gpt_j_residual,
        "vocab_size": vocab_size,
    }


def neox_keys(architecture: Architecture) -> dict[str, Any]:
    """Return the keys of a NeoX configuration that describe the model."""
    settings = architecture.settings
    keys: dict[str, Any] = {
        "num_layers": settings.num_layers,
        "hidden_size": settings.hidden_size,
        "num_attention_heads": settings.num_attention_heads,
        "seq_length": settings.seq_length,
        "max_position_embeddings": settings.max_position_embeddings,
        "norm": settings.norm,
        "layernorm_epsilon": settings.norm_epsilon,
        "pos_emb": settings.pos_emb,
        "rotary_pct": _fraction(settings.rotary_dims, settings.head_size),
        "rotary_emb_base": _integral(settings.rotary_base),
        "activation": "gelu",
        "bias_gelu_fusion": settings.activation == "gelu_tanh",
        "gpt_j_residual": settings.gpt_j_residual,
        "no_weight_tying": not settings.tied_embedding,
        "output_layer_parallelism": "column",
        "use_bias_in_attn_linear": settings.bias_in_attention,
        "hidden_dropout": settings.hidden_dropout,
        "attention_dropout": settings.attention_dropout,
        "init_method_std": architecture.init_std,
    }
    if settings.mlp_up_size != 4 * settings.hidden_size:
        keys["intermediate_size"] = settings.mlp_up_size
    return keys


def _other_model(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("model_type") != _MODEL_TYPE:
        yield f"model_type is {config.get('model_type')!r}, not {_MODEL_TYPE!r}"
    classes = config.get("architectures") or [_CLASS]
    if classes != [_CLASS]:
        yield f"architectures is {classes!r}, not {[_CLASS]!r}"


def _bad_sizes(config: Mapping[str, Any]) -> Iterator[str]:
    for name in _SIZES:
        value = config.get(name)
        if type(value) is not int or value < 1:
            yield f"{name} is {value!r}, not a size" if name in config else f"{name} is missing"


def _unknown_parts(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("hidden_act", "gelu") not in HIDDEN_ACTS:
        yield f"hidden_act is {config['hidden_act']!r} (known: {', '.join(HIDDEN_ACTS)})"
    if config.get("quantization_config"):
        yield "quantization_config is set: its weights are not numbers by themselves"
    scaling = config.get("rope_scaling")
    parameters = config.get("rope_parameters") or {}
    kind = parameters.get("rope_type", "default") if isinstance(parameters, dict) else parameters
    if scaling:
        yield f"rope_scaling is {scaling!r}, and NeoX scales no rotary positions"
    elif kind != "default":
        yield f"rope_type is {kind!r}, and NeoX scales no rotary positions"
    _, base = _rotary(config)
    if not isinstance(base, int | float) or base != int(base) or base < 1:
        yield f"the rotary base is {base!r}, and NeoX's rotary_emb_base is a positive integer"


def _rotary(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the rotated share of a head and the base, in whatever release's spelling."""
    parameters = config.get("rope_parameters") or {}
    pct = _first(parameters.get("partial_rotary_factor"), config.get("partial_rotary_factor"))
    base = _first(parameters.get("rope_theta"), config.get("rope_theta"))
    return (
        _first(pct, config.get("rotary_pct"), _ROTARY_PCT),
        _first(base, config.get("rotary_emb_base"), _ROTARY_BASE),
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _inexpressible(settings: ModelSettings) -> Iterator[str]:
    if settings.norm != "layernorm":
        yield f"norm: {settings.norm}"
    if settings.pos_emb != "rotary":
        yield f"pos_emb: {settings.pos_emb}"
    if settings.activation not in _WRITTEN_ACTS:
        yield f"activation: {settings.activation}"
    if settings.is_grouped_query:
        yield f"num_kv_heads: {settings.num_kv_heads}"
    if settings.gpt_j_tied:
        yield "gpt_j_tied: true"
    if not settings.bias_in_mlp:
        yield "use_bias_in_mlp: false"
    if settings.mlp_up_size != settings.mlp_down_size:
        yield f"an MLP of {settings.mlp_up_size} rows and {settings.mlp_down_size} columns"


def _fraction(rotary_dims: int, head_size: int) -> float:
    """Return the share of a head that gives ``rotary_dims`` again when it is cut to an integer."""
    share = rotary_dims / head_size
    return share if int(head_size * share) == rotary_dims else (rotary_dims + 0.5) / head_size


def _integral(number: float) -> int | float:
    return int(number) if number == int(number) else number
