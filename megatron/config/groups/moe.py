"""Keys of mixture-of-experts layers."""

from dataclasses import dataclass
from typing import Literal

from megatron.config.declare import key, part_of, refused

__all__ = ["MoE"]

_TUNES_EXPERTS = part_of("moe_num_experts")


@dataclass(frozen=True, kw_only=True)
class MoE:
    """Mixture of experts: several MLPs per layer, of which each token uses a few."""

    moe_num_experts: int | None = key(
        1, tier=3, unit="experts", minimum=1, outcome=refused("train a dense model: 1")
    )
    """MLPs per mixture layer; 1 is an ordinary dense model."""

    moe_expert_interval: int | None = key(1, tier=3, minimum=1, outcome=_TUNES_EXPERTS)
    """Every so-manieth layer is a mixture."""

    moe_top_k: int | None = key(1, tier=3, minimum=1, outcome=_TUNES_EXPERTS)
    """Experts a token is sent to."""

    moe_router_type: Literal["sinkhorn", "topk"] | None = key(
        "sinkhorn", tier=3, outcome=_TUNES_EXPERTS
    )
    """How tokens are assigned to experts."""

    moe_lbl_in_fp32: bool | None = key(False, tier=3, outcome=_TUNES_EXPERTS)
    """Compute the load-balancing loss in fp32."""

    moe_jitter_eps: float | None = key(None, tier=3, outcome=_TUNES_EXPERTS)
    """Size of the noise on the router's input. Unset: none."""
