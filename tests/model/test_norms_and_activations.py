"""Norms and activations against their formulas (spec/model.md §3, §7)."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.model.composed import ComposedModel, randomise, settings_of

ROTARY = {"pos_emb": "rotary", "no_weight_tying": True}


def _erf_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": _erf_gelu,
    "relu": lambda x: x.clamp(min=0),
    "softsign": lambda x: x / (1 + x.abs()),
    "swish": lambda x: x * torch.sigmoid(x),
    "silu": lambda x: x * torch.sigmoid(x),
    "mish": lambda x: x * torch.tanh(torch.log1p(x.exp())),
}
GATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "geglu": _erf_gelu,
    "reglu": PLAIN["relu"],
    "swiglu": PLAIN["swish"],
    "bilinear": lambda x: x,
    "glu": torch.sigmoid,
}


def _mlp(**keys):
    model = ComposedModel(settings_of(**{**ROTARY, **keys}))
    randomise(model)
    return dict(model.named_modules())["2.mlp"]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("bias", [True, False])
def test_plain_activations(name, bias):
    mlp = _mlp(activation=name, use_bias_in_mlp=bias)
    hidden = torch.randn(16, 2, 32)
    wide = F.linear(hidden, mlp.linear1.weight, mlp.linear1.bias)
    expected = F.linear(PLAIN[name](wide), mlp.linear2.weight, mlp.linear2.bias)
    torch.testing.assert_close(mlp(hidden), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("bias", [True, False])
def test_gated_activations_scale_the_first_half_by_the_second(name, bias):
    mlp = _mlp(activation=name, intermediate_size=96, use_bias_in_mlp=bias)
    hidden = torch.randn(16, 2, 32)
    up, gate = F.linear(hidden, mlp.linear1.weight, mlp.linear1.bias).chunk(2, dim=-1)
    expected = F.linear(up * GATED[name](gate), mlp.linear2.weight, mlp.linear2.bias)
    torch.testing.assert_close(mlp(hidden), expected, rtol=1e-5, atol=1e-5)


def test_fused_gelu_is_the_tanh_formula():
    mlp = _mlp(bias_gelu_fusion=True)
    hidden = torch.randn(16, 2, 32)
    wide = F.linear(hidden, mlp.linear1.weight, mlp.linear1.bias)
    expected = F.linear(_tanh_gelu(wide), mlp.linear2.weight, mlp.linear2.bias)
    torch.testing.assert_close(mlp(hidden), expected, rtol=1e-5, atol=1e-5)


def _norm(**keys):
    model = ComposedModel(settings_of(**{**ROTARY, **keys}))
    randomise(model)
    return dict(model.named_modules())["2.input_layernorm"]


def test_scalenorm_divides_by_the_length_and_at_least_by_epsilon():
    norm = _norm(norm="scalenorm", scalenorm_epsilon=0.5)
    hidden = torch.randn(16, 2, 32)
    expected = hidden / hidden.square().sum(-1, keepdim=True).sqrt() * norm.g
    torch.testing.assert_close(norm(hidden), expected)
    short = hidden / hidden.norm(dim=-1, keepdim=True) * 0.1
    torch.testing.assert_close(norm(short), short / 0.5 * norm.g)


def test_a_norm_without_parameters_is_layernorm_at_its_first_values():
    norm = _norm(norm="non_parametric_layernorm")
    assert list(norm.parameters()) == []
    hidden = torch.randn(16, 2, 32)
    torch.testing.assert_close(norm(hidden), F.layer_norm(hidden, (32,), eps=1e-5))


def test_sinusoids_are_added_to_the_embedding():
    model = ComposedModel(settings_of(pos_emb="sinusoidal", no_weight_tying=True))
    embedding = dict(model.named_modules())["0"]
    tokens = torch.randint(0, 128, (2, 16))
    added = embedding(tokens) - embedding.word_embeddings(tokens)
    for position, dim in ((0, 0), (5, 3), (15, 15)):
        angle = position * 10000 ** (-2 * dim / 32)
        for row in range(2):
            assert added[row, position, dim].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert added[row, position, 16 + dim].item() == pytest.approx(math.cos(angle), abs=1e-5)
