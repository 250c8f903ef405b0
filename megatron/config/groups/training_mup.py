"""Training keys of muP, parametrisation that carries hyperparameters over to larger widths."""

from dataclasses import dataclass

from megatron.config.declare import key, no_effect, part_of, refused

__all__ = ["TrainingMup"]

_OFF = refused("set it to false")
_TUNES_MUP = part_of("use_mup")
_UNUSED = no_effect("nothing reads it, in NeoX neither")


@dataclass(frozen=True, kw_only=True)
class TrainingMup:
    """Maximal update parametrisation."""

    use_mup: bool | None = key(False, tier=3, outcome=_OFF)
    """Scale initial weights, learning rates and logits with the width."""

    coord_check: bool | None = key(False, tier=3, outcome=_OFF)
    """Measure how activations grow with the width, then exit."""

    save_base_shapes: bool | None = key(False, tier=3, outcome=_OFF)
    """Write the shapes of a base model, then exit."""

    base_shapes_file: str | None = key(None, tier=3, outcome=_TUNES_MUP)
    """File with the base model's shapes."""

    mup_init_scale: float | None = key(1.0, tier=3, outcome=_TUNES_MUP)
    """Factor on initial weights."""

    mup_attn_temp: float | None = key(1.0, tier=3, outcome=_UNUSED)
    """Meant as a factor on attention scores."""

    mup_output_temp: float | None = key(1.0, tier=3, outcome=_UNUSED)
    """Meant as a factor on logits."""

    mup_embedding_mult: float | None = key(1.0, tier=3, outcome=_TUNES_MUP)
    """Factor on word embeddings."""

    mup_rp_embedding_mult: float | None = key(1.0, tier=3, outcome=refused("set it to 1.0"))
    """Factor on learned and sinusoidal positions, in NeoX also without ``use_mup``."""

    mup_width_scale: int | None = key(2, tier=3, outcome=_TUNES_MUP)
    """How much wider the second model of a coordinate check is."""
