"""The architecture as one frozen value, built from the configuration's groups."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron.base.errors import ConfigError
from megatron.model.facts import ModelFacts

__all__ = ["FIRST_BLOCK", "ModelSettings", "mlp_sizes"]

FIRST_BLOCK = 2
"""NeoX's layer number of block 0."""

Activation = Literal[
    "gelu",
    "gelu_tanh",
    "relu",
    "softsign",
    "swish",
    "mish",
    "silu",
    "geglu",
    "reglu",
    "swiglu",
    "bilinear",
    "glu",
]
InitMethod = Literal[
    "normal",
    "scaled_normal",
    "single_residual_scaled_normal",
    "small_init",
    "wang_init",
    "xavier_uniform",
    "xavier_normal",
    "orthogonal",
    "scaled_orthogonal",
]

_SUPPORTED = {"norm": ("layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm")}
_GATED = ("geglu", "reglu", "swiglu", "bilinear", "glu")
_ATTENTION_TYPES = ("global", "flash")
_NOT_YET = "known to NeoX, not supported here yet"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Everything the model's shape and arithmetic depend on, but no topology and no data type."""

    num_layers: int  # transformer blocks
    hidden_size: int
    num_attention_heads: int  # query heads
    num_kv_heads: int  # equal to the query heads for plain multi-head attention
    seq_length: int  # longest sequence the rotary table covers
    max_position_embeddings: int  # rows of the learned position table
    padded_vocab_size: int
    tp_bias_multiplicity: int = 1

    pos_emb: Literal["rotary", "learned", "sinusoidal", "rpe", "alibi", "none"] = "rotary"
    rotary_dims: int = 0  # leading dimensions of each head that are rotated
    rotary_base: float = 10000.0
    rotary_angles: Literal["float32", "parameters"] = "float32"  # the type they are computed in
    saves_rotary_frequencies: bool = False  # as a buffer of every block, in files too
    position_offset: int = 0  # added to learned positions
    rpe_num_buckets: int = 32  # distances the relative bias tells apart
    rpe_max_distance: int = 128  # tokens from which on all are alike to it

    sliding_window: int | None = None  # tokens before itself that a token sees; None: all
    normalises_queries_and_keys: bool = False
    scales_by_layer: bool = False  # NeoX's apply_query_key_layer_scaling

    norm: Literal["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"] = "layernorm"
    norm_epsilon: float = 1e-5

    activation: Activation = "gelu"
    mlp_up_size: int  # rows of linear1: for a gated activation both halves together
    mlp_down_size: int  # columns of linear2

    gpt_j_residual: bool = False  # attention and MLP side by side, not one after the other
    gpt_j_tied: bool = False  # both read the same norm's output
    tied_embedding: bool = False
    bias_in_attention: bool = True
    bias_in_mlp: bool = True

    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    init_method: InitMethod = "normal"
    output_layer_init_method: InitMethod = "scaled_normal"
    init_method_std: float = 0.02

    def __post_init__(self) -> None:
        problems = list(_inconsistencies(self))
        if problems:
            raise ConfigError(*problems)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def is_grouped_query(self) -> bool:
        """Whether several query heads share one key and value head, with NeoX's blocked layout."""
        return self.num_kv_heads != self.num_attention_heads

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies an activated half with a plain one."""
        return self.activation in _GATED

    @classmethod
    def from_config(
        cls,
        model: Any,
        training: Any,
        facts: ModelFacts,
        *,
        neox_version: Literal["main", "v1.0"] = "main",
    ) -> "ModelSettings":
        """Build the settings from NeoX's keys.

        Args:
            model: the group ``Model``; attributes are NeoX's key names, after derivation.
            training: the group ``Training``, for the two dropout rates.
            facts: the pinned vocabulary and bias multiplicity.
            neox_version: whose arithmetic to follow where the two differ.

        Raises:
            ConfigError: a value is not supported here yet, or values contradict each other.
        """
        problems = list(_unsupported(model, neox_version))
        if problems:
            raise ConfigError(*problems)
        heads = model.num_attention_heads
        head_size = model.hidden_size // heads
        is_rotary = model.pos_emb == "rotary"
        is_tanh = model.activation == "gelu" and model.bias_gelu_fusion
        up_size, down_size = mlp_sizes(
            model.hidden_size,
            intermediate_size=model.intermediate_size,
            expansion_factor=model.expansion_factor,
            multiple_of=model.mlp_multiple_of,
            gated=model.activation in _GATED,
        )
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=heads,
            num_kv_heads=model.num_kv_heads or heads,
            seq_length=model.seq_length,
            max_position_embeddings=model.max_position_embeddings,
            padded_vocab_size=facts.padded_vocab_size,
            tp_bias_multiplicity=facts.tp_bias_multiplicity,
            pos_emb=model.pos_emb,
            rotary_dims=int(head_size * model.rotary_pct) if is_rotary else 0,
            rotary_base=float(model.rotary_emb_base),
            rotary_angles="parameters" if neox_version == "v1.0" else "float32",
            saves_rotary_frequencies=is_rotary and bool(model.rotary_save_freqs_buffer),
            position_offset=model.opt_pos_emb_offset or 0,
            rpe_num_buckets=model.rpe_num_buckets,
            rpe_max_distance=model.rpe_max_distance,
            sliding_window=model.sliding_window_width,
            normalises_queries_and_keys=bool(model.use_qk_layernorm),
            scales_by_layer=bool(model.apply_query_key_layer_scaling),
            norm=model.norm,
            norm_epsilon=_norm_epsilon(model),
            activation="gelu_tanh" if is_tanh else model.activation,
            mlp_up_size=up_size,
            mlp_down_size=down_size,
            gpt_j_residual=model.gpt_j_residual,
            gpt_j_tied=model.gpt_j_residual and model.gpt_j_tied,
            tied_embedding=not model.no_weight_tying,
            bias_in_attention=model.use_bias_in_attn_linear,
            bias_in_mlp=model.use_bias_in_mlp,
            hidden_dropout=training.hidden_dropout,
            attention_dropout=training.attention_dropout,
            init_method=model.init_method,
            output_layer_init_method=model.output_layer_init_method,
            init_method_std=model.init_method_std,
        )

    def require_divisible(self, tensor_parallel_size: int) -> None:
        """Refuse a tensor-parallel size that heads or MLP cannot be divided by.

        The vocabulary need not divide: the last rank then holds rows that don't count.

        Raises:
            ConfigError: with one message per size that doesn't divide.
        """
        halves = 2 if self.is_gated else 1
        sizes = {
            "num_attention_heads": self.num_attention_heads,
            "num_kv_heads": self.num_kv_heads,
            "the MLP's inner width": self.mlp_up_size // halves,
            "the MLP's second matrix": self.mlp_down_size,
        }
        problems = [
            f"{name} ({size}) must be a multiple of model_parallel_size ({tensor_parallel_size})"
            for name, size in sizes.items()
            if size % tensor_parallel_size
        ]
        if tensor_parallel_size > 1 and self.normalises_queries_and_keys and self.norm != "rmsnorm":
            problems.append(
                f"use_qk_layernorm with norm: {self.norm} normalises over all heads of a rank, so "
                f"that the model would change with model_parallel_size ({tensor_parallel_size}); "
                "use norm: rmsnorm, or model_parallel_size: 1"
            )
        if problems:
            raise ConfigError(*problems)


def mlp_sizes(
    hidden_size: int,
    *,
    intermediate_size: int | None,
    expansion_factor: float | None,
    multiple_of: int,
    gated: bool,
) -> tuple[int, int]:
    """Return the rows of ``linear1`` and the columns of ``linear2``.

    For a gated MLP NeoX takes two thirds of the configured width for both halves together, so
    the width in a configuration is three times the real one (spec/model.md §3).

    Example:
        >>> mlp_sizes(4096, intermediate_size=32768, expansion_factor=None, multiple_of=256,
        ...           gated=True)
        (22016, 11008)

    Raises:
        ConfigError: both widths are given, or the halves come out unequal.
    """
    if intermediate_size and expansion_factor:
        raise ConfigError(
            f"intermediate_size={intermediate_size} and expansion_factor={expansion_factor} both "
            "set the MLP's width; give one of them"
        )
    if intermediate_size:
        width = intermediate_size
    elif expansion_factor:
        width = int(expansion_factor * hidden_size)
    else:
        width = 4 * hidden_size
    if not gated:
        return _round_up(width, 2 * multiple_of), _round_up(width, multiple_of)
    both_halves = int(width * 2 / 3)
    up_size = _round_up(both_halves, 2 * multiple_of)
    down_size = _round_up(both_halves // 2, multiple_of)
    if up_size != 2 * down_size:
        raise ConfigError(
            f"a gated MLP of width {width} with mlp_multiple_of {multiple_of} would have halves of "
            f"{up_size // 2} but a second matrix of {down_size}; set intermediate_size to three "
            f"times the inner width you want, for example {3 * up_size // 2}"
        )
    return up_size, down_size


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _norm_epsilon(model: Any) -> float:
    if model.norm == "rmsnorm":
        return model.rms_norm_epsilon
    return model.scalenorm_epsilon if model.norm == "scalenorm" else model.layernorm_epsilon


def _unsupported(model: Any, neox_version: str) -> Any:
    for name, supported in _SUPPORTED.items():
        value = getattr(model, name)
        if value not in supported:
            yield f"{_NOT_YET}: {name}: {value} (supported: {', '.join(supported)})"
    types = model.attention_config or ["global"] * model.num_layers
    if len(types) != model.num_layers:
        yield f"attention_config names {len(types)} layers, but num_layers is {model.num_layers}"
    for other in sorted({str(kind) for kind in types} - set(_ATTENTION_TYPES)):
        yield f"{_NOT_YET}: attention_config: {other} (supported: {', '.join(_ATTENTION_TYPES)})"
    if neox_version == "v1.0" and model.activation == "geglu":
        yield f"{_NOT_YET}: activation: geglu with neox_version: v1.0, whose MLP was twice as wide"


def _inconsistencies(settings: ModelSettings) -> Any:
    heads = settings.num_attention_heads
    if settings.hidden_size % heads:
        yield (
            f"hidden_size ({settings.hidden_size}) must be a multiple of "
            f"num_attention_heads ({heads})"
        )
    if heads % settings.num_kv_heads:
        yield (
            f"num_attention_heads ({heads}) must be a multiple of "
            f"num_kv_heads ({settings.num_kv_heads})"
        )
    if settings.normalises_queries_and_keys and settings.is_grouped_query:
        yield (
            f"use_qk_layernorm has one scale per query head, which {settings.num_kv_heads} key "
            f"heads for {heads} query heads can't share; leave num_kv_heads out"
        )
    if settings.pos_emb == "rpe":
        exact = settings.rpe_num_buckets // 2
        if not 1 <= exact < settings.rpe_max_distance:
            yield (
                f"rpe_num_buckets ({settings.rpe_num_buckets}) must be at least 2, and "
                f"rpe_max_distance ({settings.rpe_max_distance}) greater than half of it"
            )
    if settings.pos_emb == "rotary":
        rotated = settings.rotary_dims
        if rotated < 2 or rotated % 2 or rotated > settings.head_size:
            yield (
                f"rotary_pct rotates {rotated} of {settings.head_size} dimensions of a head; "
                "it must be an even number of at least 2"
            )
    last_position = settings.seq_length + settings.position_offset
    if settings.pos_emb == "learned" and last_position > settings.max_position_embeddings:
        yield (
            f"seq_length ({settings.seq_length}) + opt_pos_emb_offset "
            f"({settings.position_offset}) needs {last_position} learned positions, but "
            f"max_position_embeddings is {settings.max_position_embeddings}"
        )
    if settings.tp_bias_multiplicity != 1 and not settings.gpt_j_residual:
        yield f"tp_bias_multiplicity={settings.tp_bias_multiplicity} needs gpt_j_residual: true"
