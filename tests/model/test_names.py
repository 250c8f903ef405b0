"""Layers, tensors and their order are NeoX's."""

import json
import re
from pathlib import Path

import pytest
import torch

from megatron.base.errors import ConfigError
from megatron.model.layer_plan import layer_plan
from megatron.model.parallel_layers import TensorParallel
from tests.model.composed import ComposedModel, settings_of

DATA = Path(__file__).parent.parent / "data" / "model"
RECORDED = json.loads((DATA / "model_params.json").read_text())
# NeoX builds these, with halves of 43 and a second matrix of 42, and crashes in their forward.
UNEQUAL_HALVES = ("geglu", "swiglu_default")
VARIANTS = {name: recorded for name, recorded in RECORDED.items() if name not in UNEQUAL_HALVES}
# What the recorded variants were built with besides their own keys.
COMMON = {"pos_emb": "rotary", "no_weight_tying": True}


def _settings(variant: str):
    # No shape depends on it; with OPT's offset the 16 learned positions hold 14 tokens.
    room = {"seq_length": 14} if variant == "opt" else {}
    return settings_of(**{**COMMON, **RECORDED[variant]["cfg"], **room})


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_have_neox_names_shapes_and_order(variant):
    settings = _settings(variant)
    state = ComposedModel(settings).state_dict()
    ours = [(f"sequential.{name}", list(tensor.shape)) for name, tensor in state.items()]
    assert ours == list(VARIANTS[variant]["seq"].items())
    prefix = "tied_modules.embed." if settings.tied_embedding else "0."
    in_pipeline = [
        (re.sub(r"^0\.", prefix, name), list(tensor.shape)) for name, tensor in state.items()
    ]
    assert in_pipeline == list(VARIANTS[variant]["pipe"].items())


@pytest.mark.parametrize("variant", UNEQUAL_HALVES)
def test_a_gated_mlp_with_unequal_halves_is_refused_with_neox_sizes(variant):
    recorded = RECORDED[variant]["pipe"]
    assert recorded["2.mlp.linear1.weight"][0] == 86
    assert recorded["2.mlp.linear2.weight"][1] == 42
    with pytest.raises(ConfigError, match="halves of 43 but a second matrix of 42"):
        _settings(variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_classes_are_neox_layers(variant):
    plan = layer_plan(_settings(variant), TensorParallel(), seed=1)
    ours = ["function" if layer.is_function else layer.kind.__name__ for layer in plan]
    recorded = VARIANTS[variant]["layers"]
    expected = [
        # NeoX's function slots have names of their own, its tied head is a functools.partial.
        "function" if name.startswith("_") else "EmbeddingPipe" if name == "partial" else name
        for name in recorded
    ]
    assert ours == expected
    assert [layer.index for layer in plan] == list(range(len(recorded)))


def test_only_blocks_match_the_default_partition_method():
    plan = layer_plan(_settings("neox_untied_rotary"), TensorParallel(), seed=1)
    matching = [
        layer.index
        for layer in plan
        if re.search("transformer|mlp", layer.kind.__name__, re.IGNORECASE)
    ]
    assert matching == [2, 3]
    assert [layer.index for layer in plan if layer.is_transformer] == matching


def test_a_tied_head_is_the_embedding_with_another_forward():
    plan = layer_plan(_settings("tied_learned"), TensorParallel(), seed=1)
    first, last = plan[0], plan[-1]
    assert first.tied_key == last.tied_key == "embed"
    assert first.tied_weights == last.tied_weights == ["word_embeddings.weight"]
    assert first.tied_forward is None
    assert last.tied_forward is not None
    # The last stage builds a second copy: it must begin with the same values.
    assert torch.equal(
        first.factory().word_embeddings.weight, last.factory().word_embeddings.weight
    )


def test_divided_parameters_are_marked_for_deepspeeds_gradient_norm():
    model = ComposedModel(settings_of(gpt_j_residual=True, **COMMON))
    marked = {
        name.split(".", 1)[1]
        for name, parameter in model.named_parameters()
        if getattr(parameter, "tensor_model_parallel", False)
    }
    assert marked == {
        "word_embeddings.weight",
        "attention.query_key_value.weight",
        "attention.query_key_value.bias",
        "attention.dense.weight",
        "mlp.linear1.weight",
        "mlp.linear1.bias",
        "mlp.linear2.weight",
        "final_linear.weight",
    }


def test_state_dicts_load_strictly_into_a_new_model():
    settings = _settings("gqa")
    state = ComposedModel(settings, seed=1).state_dict()
    other = ComposedModel(settings, seed=2)
    other.load_state_dict(state, strict=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in other.state_dict().items())
