"""Shapes worked out without building are those of the built model, and NeoX's."""

import math

import pytest

from megatron.model.parameter_shapes import parameter_shapes
from megatron.model.tp_layout import full_shape
from tests.model.composed import ComposedModel, settings_of
from tests.model.test_names import COMMON, VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_are_those_of_the_built_model(variant):
    room = {"seq_length": 14} if variant == "opt" else {}
    settings = settings_of(**{**COMMON, **VARIANTS[variant]["cfg"], **room})
    worked_out = {
        f"{layer}.{name}": shape
        for layer, shapes in parameter_shapes(settings).items()
        for name, shape in shapes.items()
    }
    built = ComposedModel(settings)
    shared = {name: tuple(p.shape) for name, p in built.named_parameters(remove_duplicate=False)}
    assert worked_out == shared
    assert list(worked_out) == [name for name in built.state_dict() if name in worked_out]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tensor_ranks_part_is_a_part_of_the_whole(variant):
    keys = {**COMMON, **VARIANTS[variant]["cfg"]}
    if keys.get("num_kv_heads") == 1 or keys.get("use_qk_layernorm"):
        keys |= {"num_kv_heads": None, "use_qk_layernorm": False}
    keys |= {"seq_length": 14} if variant == "opt" else {}
    settings = settings_of(**keys)
    whole = parameter_shapes(settings)
    for layer, shapes in parameter_shapes(settings, tensor_parallel_size=2).items():
        for name, shape in shapes.items():
            assert full_shape(name, shape, settings) == whole[layer][name]


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "vocabulary", "parameters"),
    [
        (6, 128, 4, 50304, 14_067_712),
        (6, 512, 8, 50304, 70_426_624),
        (16, 2048, 8, 50304, 1_011_781_632),
        (32, 4096, 32, 50432, 6_857_302_016),
        (36, 5120, 40, 50688, 11_846_072_320),
    ],
)
def test_pythias_models_have_as_many_parameters_as_published(
    layers, hidden, heads, vocabulary, parameters
):
    keys = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    settings = settings_of(
        vocabulary=vocabulary, rotary_pct=0.25, gpt_j_residual=True, **keys, **COMMON
    )
    shapes = parameter_shapes(settings).values()
    assert sum(math.prod(shape) for layer in shapes for shape in layer.values()) == parameters
