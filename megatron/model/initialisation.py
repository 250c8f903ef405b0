"""First values of the parameters, equal at every tensor- and pipeline-parallel size.

Each matrix has a random generator of its own, seeded by (seed, layer number, name): the whole
matrix is drawn in float32 on the CPU and every rank keeps its part. NeoX draws shards from per-rank
generators instead, so its first values depend on the topology (docs/differences.md).
"""

import hashlib
import math

import torch

from megatron.model.settings import FIRST_BLOCK, InitMethod, ModelSettings
from megatron.model.tp_layout import full_shape, split

__all__ = ["initialise_layer", "parameter_seed"]

_OUTPUT_SIDE = ("attention.dense.weight", "mlp.linear2.weight")
_SHARED = "attention.rpe.weight"


def initialise_layer(
    layer: torch.nn.Module,
    *,
    layer_index: int,
    seed: int,
    settings: ModelSettings,
    size: int,
    rank: int,
) -> None:
    """Fill the matrices of ``layer``; biases and norms keep the zeros and ones they were born with.

    Args:
        layer: parameters named as in a layer file.
        layer_index: NeoX's layer number.
        seed: the run's seed.
        settings: the model.
        size: tensor-parallel size.
        rank: tensor rank whose part is kept.
    """
    for name, parameter in layer.named_parameters():
        if parameter.dim() < 2 or "qk_layernorm" in name:
            continue
        whole = torch.empty(full_shape(name, parameter.shape, settings), dtype=torch.float32)
        # All blocks share one table of relative positions: whichever is first on a rank draws it.
        number = FIRST_BLOCK if name == _SHARED else layer_index
        generator = torch.Generator().manual_seed(parameter_seed(seed, number, name))
        method = _method(name, settings)
        _draw(whole, method, settings, generator)
        with torch.no_grad():
            parameter.copy_(split(name, whole, size=size, rank=rank, settings=settings))


def _method(name: str, settings: ModelSettings) -> InitMethod:
    if name == _SHARED:
        return "xavier_normal"
    if name in _OUTPUT_SIDE:
        return settings.output_layer_init_method
    return settings.init_method


def parameter_seed(seed: int, layer_index: int, name: str) -> int:
    """Return the 63-bit seed of one parameter's generator, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{layer_index}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _draw(
    whole: torch.Tensor, method: InitMethod, settings: ModelSettings, generator: torch.Generator
) -> None:
    layers = settings.num_layers
    width = settings.hidden_size
    sigma = settings.init_method_std
    deviations = {
        "normal": sigma,
        "scaled_normal": sigma / math.sqrt(2 * layers),
        "single_residual_scaled_normal": sigma / math.sqrt(layers),
        "small_init": math.sqrt(2 / (5 * width)),
        "wang_init": 2 / (layers * math.sqrt(width)),
    }
    if method in deviations:
        torch.nn.init.normal_(whole, std=deviations[method], generator=generator)
    elif method == "xavier_uniform":
        torch.nn.init.xavier_uniform_(whole, generator=generator)
    elif method == "xavier_normal":
        torch.nn.init.xavier_normal_(whole, generator=generator)
    elif method == "orthogonal":
        torch.nn.init.orthogonal_(whole, gain=math.sqrt(2), generator=generator)
    elif method == "scaled_orthogonal":
        torch.nn.init.orthogonal_(whole, gain=math.sqrt(2 / layers), generator=generator)
    else:
        raise ValueError(f"unknown initialisation {method!r}")
